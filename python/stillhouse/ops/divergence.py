"""Divergences between rows of logits: one value a row, and the loss form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .divergence_arguments import check_call, check_labels, check_rows, loss_weight
from .divergence_autograd import LossWithGradient, divergence_rows, has_kernel
from .kinds import Kind, Number
from .sparse_teacher import SparseTeacher


class Stats(NamedTuple):
    """Statistics of each row, [...] each, from the pass that makes the value; no gradient.

    `acceptance` = sum min(p, q) = 1 - TVD, the acceptance rate of speculative sampling;
    `agreement` = 1 where the top-1 columns agree (ties to the lower index); entropies and
    log-sum-exps in nats, of the tempered rows; `student_below` = sum of q where q < p. Under `TAID`
    the teacher is its moving target; under `CrossEntropy` there is none, and what compares is NaN.
    Rows that are not read have 0.
    """

    acceptance: Tensor
    agreement: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_lse: Tensor
    teacher_lse: Tensor
    student_below: Tensor


def unpack_stats(stats: Tensor) -> Stats:
    """From the tensor [7, ...] that the ops return."""
    return Stats(*stats.detach().unbind(0))


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor | SparseTeacher | None,
    kind: str | Kind = "forward_kl",
    *,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    logit_softcap: Number | tuple[Number | None, Number | None] | None = None,
    logit_scale: Number | tuple[Number, Number] = 1.0,
    labels: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Divergence of every row of logits, in nats, differentiable.

    Args:
        student_logits: [..., V] float32, bfloat16, float16 or float64; -inf columns are legal.
        teacher_logits: [..., V], any of these dtypes; or a `SparseTeacher`, for the kinds and
            tails of `Kind.sparse_tails`; None for `CrossEntropy`.
        kind: a kind (`ops.JSD(beta=0.5)`) or its name (`"jsd"`), see `ops.KINDS`.
        temperature: divides both sides' logits. No T^2 factor is applied.
        teacher_temperature: divides the teacher's instead.
        mask: bool [...]; False = the row is not read, its value and gradient are 0.
        vocab_size: read only the first columns; needed where the two widths differ.
        logit_softcap: c of c tanh(x / c), applied before the temperature; a pair is
            (student, teacher).
        logit_scale: factor of the logits, applied before the soft-cap; a pair is
            (student, teacher).
        labels: int64 [...] for `CrossEntropy` and `DKD`; -100 = the row is not counted.
        return_stats: also return `Stats`.

    Returns:
        [...] float32; float64 if either side is float64, then computed in float64.

    Gradients flow to the student, and to the teacher for kinds that have that function.

    Raises:
        ValueError: shapes, devices or ranges that do not fit, or a teacher that requires a gradient
            under a kind without one (TAID).
        TypeError: a dtype or type outside the lists above.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> student = torch.tensor([[0.25, 0.5, 0.25]]).log()
        >>> teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> ops.divergence(student, teacher, "forward_kl")
        tensor([0.1733])
    """
    call = check_call(
        student_logits,
        teacher_logits,
        kind,
        temperature,
        teacher_temperature,
        vocab_size,
        logit_softcap,
        logit_scale,
        labels,
        0.0,
    )
    check_labels(call)
    if mask is not None:
        check_rows("mask", mask, student_logits, torch.bool)
    if call.ids is None and call.teacher is not None and call.teacher.requires_grad:
        call.kind.exchange(0.5, 0.5)  # raises for a kind without a gradient to the teacher
    value, stats = divergence_rows(call, mask, return_stats)
    return (value, unpack_stats(stats)) if return_stats else value


def divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | SparseTeacher | None,
    kind: str | Kind = "forward_kl",
    *,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    logit_softcap: Number | tuple[Number | None, Number | None] | None = None,
    logit_scale: Number | tuple[Number, Number] = 1.0,
    return_stats: bool = False,
    weight: Tensor | None = None,
    denominator: Number | None = None,
    labels: Tensor | None = None,
    label_weight: Number = 0.0,
    reduction: str = "mean",
    inplace_grad: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """The scalar loss sum_n w_n l_n / sum_n w_n with its gradient made in the forward pass.

    l = (1 - label_weight) D + label_weight CE(labels), the cross-entropy at temperature 1. Since
    weights and denominator are known in the forward pass, the student's logits and their gradient
    cross memory once each, and with `inplace_grad=True` the gradient takes the logits' own place:
    no [..., V] tensor is allocated. The logits must then be the result of an operation (not a
    leaf), and nobody may read them afterwards: what autograd can see raises.

    Args as in `divergence`, and:
        weight: float [...], a weight for each row; 0 = not read. Not differentiable.
        denominator: divide by this number (or 0-d tensor) instead of sum_n w_n, for example by the
            token count of all processes.
        labels: int64 [...]; a row with -100 has no label term (under `CrossEntropy` and `DKD` it
            does not count).
        label_weight: share of the label term, in [0, 1].
        reduction: "mean" or "sum" (no division).
        inplace_grad: write the gradient over `student_logits`.

    Returns:
        a scalar, float32 or float64 as in `divergence`; 0 with zero gradients if no row counts.

    Raises:
        ValueError, TypeError: as in `divergence`; a teacher or weight that requires a gradient;
            with `inplace_grad` a leaf, or logits that share memory with the teacher's.
        RuntimeError: a second backward pass through the same loss.
    """
    call = check_call(
        student_logits,
        teacher_logits,
        kind,
        temperature,
        teacher_temperature,
        vocab_size,
        logit_softcap,
        logit_scale,
        labels,
        label_weight,
    )
    if call.teacher is not None and call.teacher.requires_grad:
        raise ValueError(
            "divergence_loss gives no gradient to the teacher: detach its logits, or use "
            "ops.divergence for mutual learning"
        )
    row_weight = loss_weight(call, mask, weight, denominator, reduction, label_weight)
    if not (student_logits.requires_grad and torch.is_grad_enabled()):
        value, stats = divergence_rows(call, row_weight != 0, return_stats)
        loss = (value.double() * row_weight).sum().to(call.result)
    else:
        if inplace_grad:
            _check_inplace(student_logits, call.teacher)
        if has_kernel(student_logits):
            arguments = (row_weight, return_stats, inplace_grad)
            loss, stats = LossWithGradient.apply(call, *arguments, student_logits)
        else:
            value, stats = divergence_rows(call, row_weight != 0, return_stats)
            loss = (value * row_weight).sum()
    return (loss, unpack_stats(stats)) if return_stats else loss


def _check_inplace(student: Tensor, teacher: Tensor | None) -> None:
    if student.is_leaf:
        raise ValueError(
            "inplace_grad=True would overwrite a leaf: pass logits that an operation made, or "
            "inplace_grad=False"
        )
    if any(n > 1 and s == 0 for n, s in zip(student.shape, student.stride(), strict=True)):
        raise ValueError(
            "inplace_grad=True needs student logits of their own memory, got an expanded view"
        )
    # Under compile, functionalisation makes a shared storage safe, and there is no pointer to ask.
    if (
        teacher is not None
        and not torch.compiler.is_compiling()
        and student.untyped_storage().data_ptr() == teacher.untyped_storage().data_ptr()
        and student.numel() > 0
    ):
        raise ValueError(
            "inplace_grad=True would overwrite the teacher: student and teacher share memory "
            "(self-distillation needs teacher_logits = logits.detach().clone())"
        )
