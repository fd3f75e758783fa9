"""The registered ops of the divergence kernel: their shapes for the compiler, their derivatives.

All ride on one kernel (csrc/divergence). Its arguments that may change during training travel in
`numbers`, a float64 [11] tensor, so that nothing recompiles.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ._library import devices
from .divergence_arguments import Call
from .divergence_reference import reference
from .kinds import KINDS

# Columns above which a row streams instead of staying in scratch; -1 is the kernel's own number.
_resident_limit = -1
# The kernels in use. Tests put others with the same schemas in their place (register).
_kernels = torch.ops.stillhouse


def kernels():
    """The ops in use."""
    return _kernels


def spend(ctx, name: str) -> None:
    """Raise where a gradient that was made in the forward pass has been handed on already."""
    if ctx.spent:
        raise RuntimeError(
            f"the gradient of {name} was handed on by its first backward pass: "
            "compute the loss again for a second one"
        )
    ctx.spent = True


def has_kernel(x: Tensor) -> bool:
    """Whether a kernel is built for this tensor's device."""
    return x.device.type in devices


def warn_without_kernel(x: Tensor, family: str = "divergence") -> None:
    """Say what a tensor of another device gets."""
    warnings.warn(
        f"stillhouse has no {family} kernel for {x.device.type}: the plain torch "
        "reference runs, with the memory and time of plain torch",
        stacklevel=4,
    )


def divergence_rows(call: Call, mask: Tensor | None, want_stats: bool) -> tuple[Tensor, Tensor]:
    """Value and statistics of each row, differentiable, by the kernel or else the reference."""
    if has_kernel(call.student):
        return _kernels.divergence(
            call.student,
            call.teacher,
            call.numbers,
            mask,
            call.labels,
            call.kind.kernel_number,
            call.vocab,
            want_stats,
            _resident_limit,
            call.ids,
            call.tail,
        )
    warn_without_kernel(call.student)
    return reference(call, mask, want_stats)


class LossWithGradient(torch.autograd.Function):
    """The loss form: the gradient is made in the forward pass and handed on by the backward."""

    @staticmethod
    def forward(ctx, call, weight, want_stats, inplace, student):
        """`student` is the call's, for autograd to see."""
        arguments = (call.teacher, call.numbers, weight, call.labels, call.kind.kernel_number)
        arguments += (call.vocab, want_stats, _resident_limit, call.ids, call.tail)
        if inplace:
            gradient = student.detach()
            loss, stats = _kernels.divergence_loss_(gradient, *arguments)
            # A C++ op does not bump the version; whoever saved these logits must raise in backward.
            torch.autograd.graph.increment_version(student)
        else:
            loss, stats, gradient = _kernels.divergence_loss(student, *arguments)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(stats)
        ctx.spent = False
        return loss, stats

    @staticmethod
    def backward(ctx, upstream, _):
        if not torch.compiler.is_compiling():
            spend(ctx, "divergence_loss")
        (gradient,) = ctx.saved_tensors
        _kernels.scale_(gradient, upstream)
        return None, None, None, None, gradient


def _fake_rows(student, want_stats, teacher=None):
    double = torch.float64 in (student.dtype, None if teacher is None else teacher.dtype)
    dtype = torch.float64 if double else torch.float32
    stats = (7, *student.shape[:-1]) if want_stats else (0,)
    return student.new_empty(student.shape[:-1], dtype=dtype), student.new_empty(stats, dtype=dtype)


def _fake_divergence(
    student, teacher, numbers, mask, labels, kind, vocab=-1, want_stats=False, *rest
):
    return _fake_rows(student, want_stats, teacher)


def _fake_gradient(student, teacher, numbers, weight, labels, kind, *rest):
    return student.new_empty(student.shape)


def _fake_loss(student, teacher, numbers, weight, labels, kind, vocab=-1, want_stats=False, *rest):
    value, stats = _fake_rows(student, want_stats, teacher)
    return value.new_empty(()), stats, student.new_empty(student.shape)


def _fake_loss_(student, teacher, numbers, weight, labels, kind, vocab=-1, want_stats=False, *rest):
    value, stats = _fake_rows(student, want_stats, teacher)
    return value.new_empty(()), stats


def _setup(ctx, inputs, output):
    student, teacher, numbers, mask, labels, kind, vocab, _, resident_limit, ids, tail = inputs
    ctx.rest = kind, vocab, resident_limit, tail
    ctx.save_for_backward(student, teacher, numbers, mask, labels, ids)


_SIDES = [1, 0, 3, 2, 5, 4, 6, 7]  # numbers with student and teacher exchanged
_BY_NUMBER = {n: kind for kind in KINDS.values() for n in (kind.number, kind.variant)}


def _exchange(number: int, numbers: Tensor) -> tuple[int, Tensor]:
    """Kind number and `numbers` of the divergence whose student is this one's teacher."""
    kind = _BY_NUMBER[number]
    mirror, *parameters = kind.exchange(numbers[8], numbers[9])
    exchanged = number if mirror is kind else mirror.number
    return exchanged, torch.cat([numbers[_SIDES], torch.stack(parameters), numbers[10:]])


def _backward(ctx, upstream, _):
    student, teacher, numbers, mask, labels, ids = ctx.saved_tensors
    kind, vocab, resident_limit, tail = ctx.rest
    weight = upstream if mask is None else torch.where(mask, upstream, 0)
    gradient = _kernels.divergence_gradient
    to_student = to_teacher = None
    if ctx.needs_input_grad[0]:
        to_student = gradient(
            student, teacher, numbers, weight, labels, kind, vocab, resident_limit, ids, tail
        )
    if ctx.needs_input_grad[1]:
        kind, exchanged = _exchange(kind, numbers)
        to_teacher = gradient(
            teacher, student, exchanged, weight, None, kind, vocab, resident_limit
        )
    return to_student, to_teacher, *([None] * 9)


def no_second_derivative(ctx, *upstream):
    """The backward of every op that is a gradient."""
    raise RuntimeError("the gradient of a divergence has no gradient of its own: second derivative")


def _fake_largest(logits, k, temperature, uniform=None):
    rows, wide = len(logits), torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_probs, log_rest = (
        logits.new_empty((rows, k), dtype=wide),
        logits.new_empty(rows, dtype=wide),
    )
    drawn = (rows, 0 if uniform is None else uniform.shape[1])
    ids, drawn = (logits.new_empty(shape, dtype=torch.int32) for shape in ((rows, k), drawn))
    return ids, log_probs, log_rest, drawn


def register(namespace: str) -> None:
    """Shapes and derivatives of the ops whose schemas csrc/ops.cpp has put into this namespace."""
    fakes = {
        "divergence": _fake_divergence,
        "divergence_gradient": _fake_gradient,
        "divergence_loss": _fake_loss,
        "divergence_loss_": _fake_loss_,
        "row_state": lambda student, teacher, numbers, mask: student.new_empty(
            (6, *student.shape[:-1]), dtype=torch.float64
        ),
        "divergence_part": lambda student, *rest: student.new_empty(
            (2, *student.shape[:-1]), dtype=torch.float64
        ),
        "divergence_part_gradient": lambda student, *rest: student.new_empty(student.shape),
        "largest": _fake_largest,
        "scale_": lambda gradient, upstream: None,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
    autograd = torch.library.register_autograd
    autograd(f"{namespace}::divergence", _backward, setup_context=_setup)
    autograd(f"{namespace}::divergence_gradient", no_second_derivative)
    autograd(f"{namespace}::divergence_part_gradient", no_second_derivative)


register("stillhouse")
