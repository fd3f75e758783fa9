"""Pairs of a preferred and another response as batches of a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from stillhouse.train import LogitRows, paired, preference_loss
from stillhouse.train.examples import Example, collate
from stillhouse.train.logprobs import by_sequence, row_logprobs


def preference_batch(
    preferred: Sequence[Example], other: Sequence[Example], *, padding: int = 0
) -> dict[str, Any]:
    """P pairs of answers to the same prompts as one batch of 2 P sequences, those preferred first.

    preferred[i] and other[i]: `train.examples.Example`, prompt and response, whose `loss_mask` is
    True at the response. padding: the token that shorter ones are filled with, on the right.
    Returns `input_ids`, `attention_mask`, `labels` int64 [2 P, T] (-100 = not a target) and
    `pairs`, the number P. Raises ValueError for no pairs, for more of one than of the other, for a
    mask of another length than its ids, an empty response, and for prompts that differ.

    Defaults: padding 0, which nothing attends to.

    Example:
        >>> import numpy as np
        >>> from stillhouse.methods.language import preference_batch
        >>> from stillhouse.train.examples import Example
        >>> response = np.array([False, False, True])
        >>> better, worse = (Example(np.array([5, 3, last]), response) for last in (1, 2))
        >>> preference_batch([better], [worse])["labels"].tolist()
        [[-100, -100, 1], [-100, -100, 2]]
    """
    if not preferred or len(preferred) != len(other):
        raise ValueError(
            f"pairs need as many of both responses, got {len(preferred)} preferred ones and "
            f"{len(other)} others"
        )
    for number, pair in enumerate(zip(preferred, other, strict=True)):
        prompts = []
        for example in pair:
            ids, mask = example.input_ids, example.loss_mask
            if len(ids) != len(mask):
                raise ValueError(f"pair {number}: {len(ids)} tokens and a mask of {len(mask)}")
            if not mask[1:].any():
                raise ValueError(f"pair {number} has an empty response: nothing to prefer")
            prompts.append(ids[: int(mask.argmax())].tolist())
        if prompts[0] != prompts[1]:
            raise ValueError(f"pair {number} answers two different prompts")
    batch = collate([*preferred, *other], padding=padding)
    del batch["record"]
    return {**batch, "pairs": len(preferred)}


def prefer(
    student: LogitRows, teacher: Any, batch: Mapping[str, Any], **options: Any
) -> dict[str, Tensor]:
    """`preference_loss` on the rows of a batch of pairs, the teacher's as the reference, with how
    often either alone finds the preferred response likelier, and the margin of means over tokens.
    Raises ValueError for what is no batch of pairs, and for a teacher that is no model."""
    if "denominator" in batch:
        raise ValueError("pairs do not count by the token: train with run_stages and Taught")
    if not isinstance(teacher, LogitRows):
        found = type(teacher).__name__
        raise ValueError(f"the reference of preferences is a model's rows, got {found}")
    paired(student.index, teacher.index)
    policy, counts = pair_logprobs(student, batch)
    reference, _ = pair_logprobs(teacher, batch)
    parts = preference_loss(policy, reference, **options)
    own, given = policy.detach(), reference.detach()
    per_token = (own - given) / counts
    for name, each in (("student_accuracy", own), ("reference_accuracy", given)):
        parts[name] = (each[:, 0] > each[:, 1]).to(own.dtype).mean()
    return parts | {"token_margin": (per_token[:, 0] - per_token[:, 1]).mean()}


def pair_logprobs(rows: LogitRows, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """log-probabilities of a batch of pairs, [P, 2], the preferred response first, and its numbers
    of tokens. Raises ValueError for a batch that holds no pairs, or an empty response."""
    pairs, sequences = batch.get("pairs"), len(batch["labels"])
    if pairs is None or 2 * pairs != sequences:
        raise ValueError(
            f"expected {pairs or 'P'} pairs, twice as many sequences, the preferred first, got "
            f"{sequences}: make batches with preference_batch"
        )
    counts = rows.index.sequence.bincount(minlength=sequences)
    if bool((counts == 0).any()):
        raise ValueError(f"pair {int(counts.argmin()) % pairs} has an empty response")
    total = by_sequence(row_logprobs(rows, batch), rows.index, sequences)
    return total.view(2, pairs).T, counts.view(2, pairs).T
