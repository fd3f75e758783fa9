"""Entropic transport between the rows of a batch, the points being whole distributions."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from stillhouse import ops

Cost = str | Callable[[Tensor, Tensor], Tensor]


def sinkhorn_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
    cost: Cost = "l1",
    debias: bool = False,
    normalize: str | None = None,
    gradient: str = "unrolled",
) -> Tensor:
    """sum_ij P_ij D_ij between the rows of a batch: the batch-wise form, which the paper ends with.

    student_logits, teacher_logits: [b, C], or [G, b, C] for G batches, whose mean is taken; any
    float dtype. cost: "l1" or "l2" distance of probabilities, or a function of S [G, b, C] and U
    that gives [G, b, b]. debias: less half of the same between S and S, and U and U: 0 for S = U.
    normalize: "mass" divides by b, with which the value grows. gradient as in `ops.sinkhorn`.
    Returns a float32 scalar (float64 for float64 logits). Raises ValueError for shapes that do not
    match, an unknown cost or normalize, and a teacher that requires a gradient. Warns of a single
    row, where the plan has no choice and the loss is the plain distance.

    Defaults: temperature 2, epsilon 0.1, 20 iterations, L1 (paper and code).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import sinkhorn_kd
        >>> student = torch.zeros(2, 3, requires_grad=True)
        >>> loss = sinkhorn_kd(student, torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
        >>> loss.backward()
        >>> round(loss.item(), 4)
        1.8146
    """
    check(student_logits, teacher_logits, same_classes=True)
    if normalize not in (None, "mass"):
        raise ValueError(f"normalize must be None or 'mass', got {normalize!r}")
    if not (callable(cost) or cost in ("l1", "l2")):
        raise ValueError(f"cost must be 'l1', 'l2' or a function, got {cost!r}")
    rows = student_logits.shape[-2]
    if rows == 1:
        warnings.warn("a batch of one row: its plan has no choice", stacklevel=2)
    student, teacher = (
        probabilities(x if x.dim() == 3 else x[None], temperature)
        for x in (student_logits, teacher_logits)
    )

    def value(x: Tensor, y: Tensor) -> Tensor:
        distance = cost(x, y) if callable(cost) else _DISTANCES[cost](x, y)
        options = dict(iterations=iterations, gradient=gradient, return_plan=False)
        return ops.sinkhorn(distance, epsilon, **options).value.mean()

    loss = value(student, teacher)
    if debias:
        loss = loss - 0.5 * (value(student, student) + value(teacher, teacher))
    return loss / rows if normalize == "mass" else loss


def check(student: Tensor, teacher: Tensor, *, same_classes: bool) -> None:
    if teacher.requires_grad:
        raise ValueError("no gradient flows to the teacher: detach its logits")
    rows = student.shape[:-1] == teacher.shape[:-1] and student.dim() >= 2
    if not rows or (same_classes and student.shape != teacher.shape):
        raise ValueError(
            f"student and teacher must have the same rows{' and classes' * same_classes}, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.softmax(wide / temperature, -1)


_DISTANCES = {"l1": ops.pairwise_l1, "l2": torch.cdist}
