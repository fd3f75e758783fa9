"""Divergences of logits that never exist: from hidden states and the weights of the heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .divergence import Stats, unpack_stats
from .divergence_arguments import (
    DTYPES,
    Call,
    check_call,
    check_labels,
    check_rows,
    loss_weight,
)
from .divergence_autograd import divergence_rows, has_kernel, kernels
from .kinds import Kind, Number
from .linear_divergence_autograd import Arguments, LossWithGradients, has_autocast
from .sparse_teacher import SparseTeacher


@dataclass(frozen=True, eq=False)
class LinearTeacher:
    """A teacher as hidden states and output head: its logits are `hidden @ weight.T + bias`.

    hidden: [..., H_t]; weight: [V, H_t]; bias: [V] or None. float32, bfloat16, float16 or float64,
    the same for all three, and not that of the student. Gradients do not reach it.

    Raises TypeError or ValueError for what does not fit together.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        check_head("LinearTeacher", self.hidden, self.weight, self.bias)


def check_head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for what, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is None and what == "bias":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}'s {what} must be a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name}'s {what} must be float32, bfloat16, float16 or float64, got {x.dtype}"
            )
        if x.device != hidden.device:
            raise ValueError(f"{name}'s {what} is on {x.device}, its hidden on {hidden.device}")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: hidden [..., H] and weight [V, H] must have one H, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: bias must be [{weight.shape[0]}], one a row of weight, got "
            f"{tuple(bias.shape)}"
        )


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | LinearTeacher | SparseTeacher | None,
    kind: str | Kind = "forward_kl",
    *,
    student_bias: Tensor | None = None,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    logit_softcap: Number | tuple[Number | None, Number | None] | None = None,
    logit_scale: Number | tuple[Number, Number] = 1.0,
    labels: Tensor | None = None,
    return_stats: bool = False,
    chunk_rows: int | None = None,
) -> Tensor | tuple[Tensor, Stats]:
    """`ops.divergence` of the logits `student_hidden @ student_weight.T + student_bias`, one value
    a row, without ever holding more than a chunk of them.

    Args as in `divergence`, and:
        student_hidden: [..., H]; student_weight: [V, H]; student_bias: [V] or None. One dtype;
            under autocast any, and the products are made in autocast's.
        teacher: `LinearTeacher`, logits [..., V], `SparseTeacher`, or None for `CrossEntropy`. The
            label's log-probability is minus the value of `CrossEntropy`.
        chunk_rows: rows whose logits exist at a time; None: about 200 MB of them for each side. A
            thread of the CPU keeps that memory for its next call.

    Returns:
        [...] float32, or float64 as in `divergence`.

    A trainable head costs six matrix products with a `LinearTeacher`: its gradient needs the rows'
    weights, which only the backward pass knows, so the logits are made a second time there. With a
    frozen head it is three. `linear_divergence_loss` needs four and three. Rows with mask False
    cost nothing. Gradients flow to student_hidden, student_weight and student_bias; the gradient
    of the weight is summed in float32 over the chunks.

    Raises:
        ValueError, TypeError: as in `divergence`; hidden states that do not match their weight; a
            teacher that requires a gradient (unless it is a head that both sides share).
        RuntimeError: a second derivative.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> head = torch.nn.Linear(4, 3, bias=False)
        >>> hidden, frozen = torch.randn(2, 5, 4), torch.randn(2, 5, 6)
        >>> teacher = ops.LinearTeacher(frozen, torch.randn(3, 6))
        >>> ops.linear_divergence(hidden, head.weight, teacher, "jsd").shape
        torch.Size([2, 5])
    """
    call, arguments = _check(
        student_hidden,
        student_weight,
        student_bias,
        teacher,
        chunk_rows,
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
    counted = mask
    if mask is not None:
        check_rows("mask", mask, call.student, torch.bool)
    if call.kind.needs_labels:
        counted = labels != -100 if mask is None else mask & (labels != -100)
    rows = call.student.shape[:-1]
    if not has_kernel(student_hidden):
        value, stats = divergence_rows(_with_logits(call, arguments), counted, return_stats)
    else:
        if counted is not None:
            arguments = arguments._replace(counted=counted.reshape(-1))
        head_learns = any(x is not None and x.requires_grad for x in (student_weight, student_bias))
        keep = student_hidden.requires_grad and torch.is_grad_enabled() and not head_learns
        value, stats, _ = kernels().linear_divergence(*arguments, return_stats, keep)
    value = value.view(rows)
    return (value, unpack_stats(stats.view(7, *rows))) if return_stats else value


def linear_divergence_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | LinearTeacher | SparseTeacher | None,
    kind: str | Kind = "forward_kl",
    *,
    student_bias: Tensor | None = None,
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
    chunk_rows: int | None = None,
) -> Tensor | tuple[Tensor, Stats]:
    """`ops.divergence_loss` of the logits `student_hidden @ student_weight.T + student_bias`,
    without ever holding more than a chunk of them.

    Args as in `linear_divergence` and `divergence_loss`. All gradients are made in the forward
    pass, with the products it needs anyway: four, or three with a frozen head, and one less where
    the teacher has no head. Rows of weight 0 cost nothing.

    Returns:
        a scalar, float32 or float64 as in `divergence`; 0 with zero gradients if no row counts.

    Raises:
        ValueError, TypeError: as in `linear_divergence` and `divergence_loss`.
        RuntimeError: a second backward pass through the same loss, or a second derivative.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> head = torch.nn.Linear(4, 3, bias=False)
        >>> hidden = torch.randn(5, 4)
        >>> teacher = ops.LinearTeacher(torch.randn(5, 6), torch.randn(3, 6))
        >>> ops.linear_divergence_loss(hidden, head.weight, teacher, denominator=5).backward()
        >>> head.weight.grad.shape
        torch.Size([3, 4])
    """
    call, arguments = _check(
        student_hidden,
        student_weight,
        student_bias,
        teacher,
        chunk_rows,
        kind,
        temperature,
        teacher_temperature,
        vocab_size,
        logit_softcap,
        logit_scale,
        labels,
        label_weight,
    )
    row_weight = loss_weight(call, mask, weight, denominator, reduction, label_weight).reshape(-1)
    if mask is not None or weight is not None or call.kind.needs_labels:
        arguments = arguments._replace(counted=row_weight != 0)
    learns = [
        x is not None and x.requires_grad and torch.is_grad_enabled()
        for x in (student_hidden, student_weight, student_bias)
    ]
    if not has_kernel(student_hidden):
        counted = (row_weight != 0).view(call.student.shape[:-1])
        value, stats = divergence_rows(_with_logits(call, arguments), counted, return_stats)
        loss = (value.reshape(-1) * row_weight).sum()
    elif any(learns):
        loss, stats = LossWithGradients.apply(*arguments, row_weight, return_stats, *learns)
    else:
        value, stats, _ = kernels().linear_divergence(*arguments, return_stats, False)
        loss = (value.double() * row_weight).sum().to(call.result)
    if not return_stats:
        return loss
    return loss, unpack_stats(stats.view(7, *call.student.shape[:-1]))


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor | LinearTeacher | SparseTeacher | None,
    chunk_rows: int | None,
    kind: str | Kind,
    temperature: Number,
    teacher_temperature: Number | None,
    vocab_size: int | None,
    logit_softcap: object,
    logit_scale: object,
    labels: Tensor | None,
    label_weight: Number,
) -> tuple[Call, Arguments]:
    """The call as for logits, and what the ops take but for the rows that count."""
    check_head("student", hidden, weight, bias)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    product = _product("student", hidden, weight, bias)
    teacher_product = None
    if isinstance(teacher, LinearTeacher):
        # What both sides share is the student's.
        own = [x for x in (teacher.weight, teacher.bias) if x is not weight and x is not bias]
        _check_frozen(teacher.hidden, *own)
        head = teacher.hidden, teacher.weight, teacher.bias
        teacher_product = _product("LinearTeacher", *head)
    elif isinstance(teacher, Tensor):
        _check_frozen(teacher)

    # What the checks of logits ask for: shape, dtype, device, without the memory.
    def logits_of(hidden: Tensor, weight: Tensor, product: torch.dtype | None) -> Tensor:
        dtype = product or weight.dtype
        return hidden.new_empty((), dtype=dtype).expand(*hidden.shape[:-1], weight.shape[0])

    teacher_logits = teacher
    if isinstance(teacher, LinearTeacher):
        teacher_logits = logits_of(teacher.hidden, teacher.weight, teacher_product)
    call = check_call(
        logits_of(hidden, weight, product),
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

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(-1, x.shape[-1])

    rows = (call.teacher, None, None)
    if isinstance(teacher, LinearTeacher):
        detached = None if teacher.bias is None else teacher.bias.detach()
        rows = (teacher.hidden, teacher.weight.detach(), detached)
    return call, Arguments(
        flat(hidden),
        weight,
        bias,
        flat(rows[0]),
        *rows[1:],
        flat(call.ids),
        call.numbers,
        None if labels is None else labels.reshape(-1),
        None,
        call.kind.kernel_number,
        call.tail,
        call.vocab,
        product,
        teacher_product,
        chunk_rows or 0,
    )


def _with_logits(call: Call, a: Arguments) -> Call:
    """What a device without kernels gets: whole logits."""

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made = torch.nn.functional.linear(hidden, weight, bias)
        return made.view(*call.student.shape[:-1], made.shape[-1])

    student, teacher = logits(a.hidden, a.weight, a.bias), call.teacher
    if a.teacher_weight is not None:
        teacher = logits(a.teacher, a.teacher_weight, a.teacher_bias)
    return call._replace(student=student, teacher=teacher)


def _check_frozen(*tensors: Tensor | None) -> None:
    if any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
        raise ValueError(
            "the linear divergence gives no gradient to the teacher: detach it, or call it a "
            "second time with the sides exchanged for mutual learning"
        )


def _product(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """What a side's products are made in: autocast's dtype, which leaves float64 alone, or None for
    that of the tensors."""
    device, found = hidden.device.type, {x.dtype for x in (hidden, weight, bias) if x is not None}
    if has_autocast(device) and torch.is_autocast_enabled(device) and torch.float64 not in found:
        return torch.get_autocast_dtype(device)
    if len(found) > 1:
        raise TypeError(
            f"{name}: hidden, weight and bias must have one dtype outside autocast, got "
            f"{hidden.dtype}, {weight.dtype}" + ("" if bias is None else f" and {bias.dtype}")
        )
    return None
