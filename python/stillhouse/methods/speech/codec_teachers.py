"""Several frozen teachers of one codec, each against stages of its quantizer."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from stillhouse.methods.speech.feature_axis import feature_axis_distillation

# [B, T, D], or with a mask bool [B, T] of the rows that count.
States = Tensor | tuple[Tensor, Tensor]


def dm_codec_loss(
    stages: Mapping[str, Tensor],
    teachers: Mapping[str, States],
    weights: Mapping[str, float] | None = None,
    *,
    axis: str = "feature",
) -> dict[str, Tensor]:
    """`feature_axis_distillation` of each teacher, and their weighted sum, "loss".

    stages: by the teacher's name, the student's features [B, T, D] that it teaches, projected to
    its width. teachers: by name, states [B, T2, D], or a pair with a mask bool [B, T2] of the rows
    that count (`align_text` gives one). weights: by name, as they are: not made to sum to 1.
    Raises ValueError for names that differ, a teacher called "loss", weights that are negative or
    sum to nothing, and what `feature_axis_distillation` raises.

    Defaults: equal weights that sum to 1 (paper: 1/2 and 1/2; it sweeps them), axis "feature".

    Example:
        >>> import torch
        >>> from stillhouse.methods.speech import dm_codec_loss
        >>> stages = {"text": torch.randn(2, 50, 8), "speech": torch.randn(2, 50, 8)}
        >>> teachers = {"text": torch.randn(2, 12, 8), "speech": torch.randn(2, 50, 8)}
        >>> list(dm_codec_loss(stages, teachers, {"text": 0.8, "speech": 0.2}))
        ['loss', 'text', 'speech']
    """
    names = list(teachers)
    if set(stages) != set(names) or not names:
        raise ValueError(
            f"stages are for {', '.join(stages) or 'no teacher'}, teachers are "
            f"{', '.join(names) or 'none'}: each needs the other"
        )
    weights = checked_weights(names, weights)
    parts = {}
    for name in names:
        states, student, mask = teachers[name], stages[name], None
        if isinstance(states, tuple):
            states, mask = states
            mask = mask[:, : student.shape[1]]
            student, states = student[:, : mask.shape[1]], states[:, : mask.shape[1]]
        parts[name] = feature_axis_distillation(student, states, axis=axis, mask=mask)
    terms = [weights[name] * part for name, part in parts.items()]
    return {"loss": sum(terms[1:], terms[0]), **parts}


def checked_weights(
    names: list[str], weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The weights of teachers by these names; equal ones that sum to 1 where there are none."""
    if "loss" in names:
        raise ValueError("a teacher cannot be called 'loss', which is the sum of all")
    if weights is None:
        return dict.fromkeys(names, 1 / max(len(names), 1))
    if set(weights) != set(names):
        raise ValueError(f"weights are of {', '.join(weights)}, teachers are {', '.join(names)}")
    numbers = list(weights.values())
    if any(not 0 <= number < math.inf for number in numbers) or (names and not sum(numbers) > 0):
        raise ValueError(f"weights must be >= 0 with a positive sum, got {dict(weights)}")
    return dict(weights)
