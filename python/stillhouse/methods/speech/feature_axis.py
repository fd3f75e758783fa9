"""A teacher's features of speech against a student's: column by column over time, or frame by
frame."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stillhouse.train.reduce import reduce

AXES = ("feature", "time")


def feature_axis_distillation(
    student: Tensor,
    teacher: Tensor,
    *,
    axis: str = "feature",
    l1_weight: float | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-log sigmoid(cos), of the student's and the teacher's n = min(T, T2) first frames.

    student: [B, T, D]; teacher: [B, T2, D], never trained through; any float dtype, reckoned in
    float32 (float64 for float64). axis "feature": the cosine of each feature's course over time,
    which does not ask that frame t of one be frame t of the other's moment, nor for scales;
    "time": the cosine of each frame, plus l1_weight times the mean absolute difference.
    mask: bool [B, T], True = this frame counts, on both sides.
    reduction "mean": the mean over a sequence's features and then over sequences, or over all
    frames that count ("time"); "none": [B, D] or [B, n], 0 where nothing counts.

    A column that is 0 all along has no direction. One of the teacher is left out, with a warning
    (on an accelerator without one: it would have to wait). One of the student has cosine 0 and
    no gradient; the same goes for frames.
    Raises ValueError unless both are rank 3 with the same B and D (the released loader gives
    rank 4, which broadcasts over the batch without a word), for a mask of another shape, a teacher
    that requires a gradient and words that are not listed here.

    Defaults: axis "feature" (the paper's); with "time" an L1 term of weight 1.

    Example:
        >>> import torch
        >>> from stillhouse.methods.speech import feature_axis_distillation
        >>> teacher = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]])
        >>> student = torch.tensor([[[2.0, 1.0], [2.0, 1.0], [9.0, 9.0]]], requires_grad=True)
        >>> loss = feature_axis_distillation(student, teacher)  # cosines 1 and 0
        >>> round(loss.item(), 4)
        0.5032
        >>> loss.backward()
    """
    if l1_weight is None:
        l1_weight = 1.0 if axis == "time" else 0.0
    _check(student, teacher, axis, l1_weight, mask, reduction)
    n = min(student.shape[1], teacher.shape[1])
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = (x[:, :n].to(dtype) for x in (student, teacher))
    counted = torch.ones_like(student[..., 0], dtype=torch.bool) if mask is None else mask[:, :n]
    # where() and not a product: what is padded may be NaN.
    student, teacher = (torch.where(counted[..., None], x, 0) for x in (student, teacher))

    over = 1 if axis == "feature" else 2
    cosine, known = _cosine(student, teacher, over)
    wanted = counted.any(1, keepdim=True) if axis == "feature" else counted
    _warn(known | ~wanted)
    rows, known = -logsigmoid(cosine), known & wanted
    if l1_weight:
        rows = rows + l1_weight * (student - teacher).abs().mean(2)
    if reduction == "none":
        return reduce(rows, known, over=None)
    return reduce(rows, known, over="sequences" if axis == "feature" else "tokens")


def _cosine(student: Tensor, teacher: Tensor, over: int) -> tuple[Tensor, Tensor]:
    """The cosine, 0 where either is 0, and where the teacher is not."""
    squares = [x.square().sum(over) for x in (student, teacher)]
    there = [each > 0 for each in squares]
    # The root's slope at 0 is infinite: such columns are taken out before it.
    lengths = [torch.where(t, s, 1).sqrt() for s, t in zip(squares, there, strict=True)]
    inner = (student / lengths[0].unsqueeze(over) * teacher / lengths[1].unsqueeze(over)).sum(over)
    return torch.where(there[0] & there[1], inner, 0), there[1]


def _warn(known: Tensor) -> None:
    if known.is_cpu and not bool(known.all()):
        warnings.warn(
            f"{int((~known).sum())} of {known.numel()} teacher columns are 0: they are left out",
            stacklevel=3,
        )


def _check(
    student: Tensor,
    teacher: Tensor,
    axis: str,
    l1_weight: float,
    mask: Tensor | None,
    reduction: str,
) -> None:
    for name, x in (("student", student), ("teacher", teacher)):
        if x.dim() != 3:
            raise ValueError(
                f"{name} must be [B, T, D], got {tuple(x.shape)}: an axis too many would be "
                "broadcast over the batch"
            )
    if student.shape[0] != teacher.shape[0] or student.shape[2] != teacher.shape[2]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in "
            "sequences or features: project the student to the teacher's width first"
        )
    if not min(student.shape[1], teacher.shape[1]):
        raise ValueError(
            f"no frame in student {tuple(student.shape)} or teacher {tuple(teacher.shape)}"
        )
    if teacher.requires_grad:
        raise ValueError("the teacher requires a gradient: detach its features")
    if axis not in AXES:
        raise ValueError(f"axis must be 'feature' or 'time', got {axis!r}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    if not 0 <= l1_weight < float("inf") or (l1_weight and axis == "feature"):
        raise ValueError(f"l1_weight must be a number >= 0, of axis 'time' alone, got {l1_weight}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != student.shape[:2]):
        raise ValueError(
            f"mask must be bool {tuple(student.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
        )
