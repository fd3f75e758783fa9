"""Distillation in which a token counts by how unsure teacher and student are of it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.train import LogitRows, reduce, row_divergence, row_means


def entropy_weighted_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    gamma: float = 0.5,
    *,
    temperature: float = 1.0,
    normalize: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Cross-entropy to the teacher of each row times H(p)^gamma H(q)^(1 - gamma), their mean.

    student_logits, teacher_logits: [..., V], any float dtype; the gradient goes to the student,
    not through the weight. normalize: divide the weights by their mean over the rows that count,
    so that a learning rate suits any gamma. temperature divides both sides, no T^2 factor. mask:
    bool [...], True = this row counts; where none does, the loss is 0.
    Returns a float32 scalar (float64 for float64 logits), in nats, or nats to the second power
    without `normalize`. Raises ValueError for gamma outside [0, 1], shapes that do not match and a
    teacher that requires a gradient.

    Defaults: gamma 0.5, normalize (both ours: the paper's numbers are not known).

    Example:
        >>> import torch
        >>> from stillhouse.methods.compression import entropy_weighted_kd
        >>> student = torch.zeros(2, 4, requires_grad=True)
        >>> teacher = torch.tensor([[2.0, 2.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
        >>> entropy_weighted_kd(student, teacher).backward()
        >>> unsure, sure = student.grad.abs().sum(-1).tolist()
        >>> unsure > sure  # without weights it is 0.38 and 0.75
        True
    """
    _check_gamma(gamma)
    value, stats = ops.divergence(
        student_logits,
        teacher_logits,
        "soft_cross_entropy",
        temperature=temperature,
        mask=mask,
        return_stats=True,
    )
    return reduce(value * _weights(stats, gamma, normalize, mask), mask)


class EntropyWeightedLoss:
    """`entropy_weighted_kd` as an objective for `DistillTrainer` ("DAD", deviation-aware).

    With the student's head at hand logits exist by the chunk only. Weights are normalised over the
    rows of a call, that is of a micro-batch. label_weight: share of the cross-entropy to the
    labels. The call returns `loss`, `weight_spread` (the standard deviation of the weights over
    their mean) and the statistics of student against teacher. A stored teacher will do; its
    entropy is that of what was stored.
    Raises ValueError for gamma or label_weight outside [0, 1].

    Defaults: gamma 0.5, normalize, label_weight 0 (all ours: the paper's numbers are not known).

    Example:
        >>> import torch
        >>> from stillhouse.methods.compression import EntropyWeightedLoss
        >>> from stillhouse.train import LogitRows, supervised_rows
        >>> index = supervised_rows(torch.tensor([[5, 3, 1, 2]]))
        >>> student = torch.zeros(3, 8, requires_grad=True)
        >>> rows = LogitRows(student * 1, index), LogitRows(torch.eye(3, 8), index)
        >>> EntropyWeightedLoss(gamma=0.5)(*rows, {})["loss"].backward()
    """

    def __init__(
        self,
        gamma: float = 0.5,
        normalize: bool = True,
        *,
        temperature: float = 1.0,
        label_weight: float = 0.0,
    ):
        _check_gamma(gamma)
        if not 0 <= label_weight <= 1:
            raise ValueError(f"label_weight is a share in [0, 1], got {label_weight}")
        self.gamma, self.normalize, self.temperature = gamma, normalize, temperature
        self.label_weight = label_weight
        self.kind = ops.SoftCrossEntropy()
        # A draw's columns have another entropy than the teacher.
        self.sparse_tails, self.takes_draws = self.kind.sparse_tails, False

    def __call__(
        self, student: LogitRows, teacher: Any, batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        if teacher is None:
            raise ValueError("the entropy-weighted loss compares with a teacher, got None")
        columns, count = {"vocab_size": batch.get("vocab_size")}, batch.get("denominator")
        if count is None:
            count = max(len(student), 1)
        # One value a row and not the loss form: the weights come out of the same pass.
        value, stats = row_divergence(
            student, teacher, self.kind, temperature=self.temperature, return_stats=True, **columns
        )
        weight = _weights(stats, self.gamma, self.normalize, None).to(value.dtype)
        loss = (1 - self.label_weight) * reduce(value * weight, count=count)
        if self.label_weight:
            labels = student.index.target
            value = row_divergence(student, None, "cross_entropy", labels=labels, **columns)
            loss = loss + self.label_weight * reduce(value, count=count)
        spread = weight.std(correction=0) / weight.mean() if weight.sum() > 0 else weight.sum()
        return {"loss": loss, "weight_spread": spread, **row_means(stats)}


def _weights(stats: ops.Stats, gamma: float, normalize: bool, mask: Tensor | None) -> Tensor:
    """[...] of the entropies of each row, 0 where it does not count."""
    # A row that is all but certain can round to less than no entropy.
    teacher, student = stats.teacher_entropy.clamp(min=0), stats.student_entropy.clamp(min=0)
    weight = teacher**gamma * student ** (1 - gamma)
    if mask is not None:
        weight = weight.masked_fill(~mask, 0)
    if not normalize:
        return weight
    mean = reduce(weight, mask)
    return weight / torch.where(mean > 0, mean, 1)


def _check_gamma(gamma: float) -> None:
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
