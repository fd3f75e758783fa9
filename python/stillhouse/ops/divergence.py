"""Divergences between rows of logits: the per-row op, the loss form, and their plain reference.

Both ride on one kernel (csrc/divergence). Its arguments that may change during training travel in
`numbers`, a float64 [9] tensor, so that nothing recompiles.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .kinds import TAID, CrossEntropy, Kind, Number, as_kind

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Columns above which a row streams instead of staying in scratch; -1 is the kernel's own number.
_resident_limit = -1


class Stats(NamedTuple):
    """Statistics of each row, [...] each, from the pass that makes the value; no gradient.

    `acceptance` = sum min(p, q) = 1 - TVD, the acceptance rate of speculative sampling;
    `agreement` = 1 where the top-1 columns agree (ties to the lower index); entropies and
    log-sum-exps in nats, of the tempered rows; `student_below` = sum of q where q < p.
    """

    acceptance: Tensor
    agreement: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_lse: Tensor
    teacher_lse: Tensor
    student_below: Tensor


# --- checks ---------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """The checked arguments of one call, as the registered ops take them."""

    student: Tensor
    teacher: Tensor | None
    kind: Kind
    numbers: Tensor
    labels: Tensor | None
    vocab: int
    result: torch.dtype


def _check_logits(name: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., V] with V >= 1, got {tuple(logits.shape)}")


def _check_rows(name: str, x: Tensor, student: Tensor, dtype: torch.dtype | None = None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
    if x.shape != student.shape[:-1]:
        raise ValueError(
            f"{name} must be {tuple(student.shape[:-1])}, one a row of the student's "
            f"{tuple(student.shape)}, got {tuple(x.shape)}"
        )
    if x.device != student.device:
        raise ValueError(f"{name} is on {x.device}, the student on {student.device}")


def _positive(name: str, value: Number) -> Number:
    if not isinstance(value, Tensor) and not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value}")
    return value


def _for_each_side(name: str, value: object, none: float) -> tuple[Number, Number]:
    """One number serves both sides, a pair is (student, teacher)."""
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a number or a pair (student, teacher), got {value}")
    student, teacher = (none if v is None else _positive(name, v) for v in pair)
    return student, teacher


def _pack(numbers: list[Number]) -> Tensor:
    if any(isinstance(n, Tensor) for n in numbers):
        return torch.stack(
            [torch.as_tensor(n).detach().to("cpu", torch.float64).reshape(()) for n in numbers]
        )
    return torch.tensor(numbers, dtype=torch.float64)


def _check(
    student: Tensor,
    teacher: Tensor | None,
    kind: str | Kind,
    temperature: Number,
    teacher_temperature: Number | None,
    vocab_size: int | None,
    logit_softcap: object,
    logit_scale: object,
    labels: Tensor | None,
    label_weight: Number,
) -> _Call:
    kind = as_kind(kind)
    _check_logits("student_logits", student)
    width = student.shape[-1]
    result = torch.float64 if student.dtype == torch.float64 else torch.float32
    if kind.needs_teacher:
        if teacher is None:
            raise ValueError(f"{type(kind).__name__} needs teacher_logits, got None")
        _check_logits("teacher_logits", teacher)
        if teacher.shape[:-1] != student.shape[:-1]:
            raise ValueError(
                f"student and teacher must have the same rows, got {tuple(student.shape)} and "
                f"{tuple(teacher.shape)}"
            )
        if teacher.device != student.device:
            raise ValueError(f"teacher is on {teacher.device}, the student on {student.device}")
        if teacher.shape[-1] != width and vocab_size is None:
            raise ValueError(
                f"student has {width} columns and teacher {teacher.shape[-1]}: pass vocab_size= to "
                "read only the columns that both have (padded embedding rows are the usual cause)"
            )
        if teacher.dtype == torch.float64:
            result = torch.float64
        width = min(width, teacher.shape[-1])
    elif teacher is not None:
        raise ValueError(f"{type(kind).__name__} has no teacher: pass teacher_logits=None")
    if vocab_size is not None and not 1 <= vocab_size <= width:
        raise ValueError(f"vocab_size must lie in [1, {width}], got {vocab_size}")
    if labels is not None:
        _check_rows("labels", labels, student, torch.int64)
    elif isinstance(kind, CrossEntropy):
        raise ValueError("CrossEntropy needs labels: int64, one a row, -100 for none")
    if not isinstance(label_weight, Tensor) and not 0 <= label_weight <= 1:
        raise ValueError(f"label_weight must lie in [0, 1], got {label_weight}")

    student_scale, teacher_scale = _for_each_side("logit_scale", logit_scale, 1.0)
    student_cap, teacher_cap = _for_each_side("logit_softcap", logit_softcap, 0.0)
    numbers = [
        _positive("temperature", temperature),
        temperature
        if teacher_temperature is None
        else _positive("teacher_temperature", teacher_temperature),
        student_scale,
        teacher_scale,
        student_cap,
        teacher_cap,
        label_weight,
        kind.label_smoothing if isinstance(kind, CrossEntropy) else 0.0,
        0.0 if isinstance(kind, CrossEntropy) else kind.parameter,
    ]
    vocab = -1 if vocab_size is None else vocab_size
    return _Call(student, teacher, kind, _pack(numbers), labels, vocab, result)


def _unpack_stats(stats: Tensor) -> Stats:
    return Stats(*stats.detach().unbind(0))


# --- public ---------------------------------------------------------------------------------------


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
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
        teacher_logits: [..., V], any of these dtypes; None for `CrossEntropy`.
        kind: a kind (`ops.JSD(beta=0.5)`) or its name (`"jsd"`), see `ops.KINDS`.
        temperature: divides both sides' logits. No T^2 factor is applied.
        teacher_temperature: divides the teacher's instead.
        mask: bool [...]; False = the row is not read, its value and gradient are 0.
        vocab_size: read only the first columns; needed where the two widths differ.
        logit_softcap: c of c tanh(x / c), applied before the temperature; a pair is
            (student, teacher).
        logit_scale: factor of the logits, applied before the soft-cap; a pair is
            (student, teacher).
        labels: int64 [...] for `CrossEntropy`; -100 = the row is not counted.
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
    call = _check(
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
    if labels is not None and call.kind.needs_teacher:
        raise ValueError(
            f"{type(call.kind).__name__} takes no labels: CrossEntropy does, and "
            "divergence_loss mixes a label term with label_weight="
        )
    if mask is not None:
        _check_rows("mask", mask, student_logits, torch.bool)
    if teacher_logits is not None and teacher_logits.requires_grad:
        call.kind.exchanged()  # raises for a kind without a gradient to the teacher
    value, stats = _rows(call, mask, return_stats)
    return (value, _unpack_stats(stats)) if return_stats else value


def divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
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
        labels: int64 [...]; a row with -100 has no label term (under `CrossEntropy` it does not
            count).
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
    call = _check(
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
    if labels is None and isinstance(label_weight, float | int) and label_weight > 0:
        raise ValueError(f"label_weight={label_weight} needs labels")
    if teacher_logits is not None and teacher_logits.requires_grad:
        raise ValueError(
            "divergence_loss gives no gradient to the teacher: detach its logits, or use "
            "ops.divergence for mutual learning"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    if reduction == "sum" and denominator is not None:
        raise ValueError('denominator goes with reduction="mean": a sum is not divided')
    row_weight = _row_weight(call, mask, weight, denominator, reduction)
    if not (student_logits.requires_grad and torch.is_grad_enabled()):
        value, stats = _rows(call, row_weight != 0, return_stats)
        loss = (value.double() * row_weight).sum().to(call.result)
    else:
        if inplace_grad:
            _check_inplace(student_logits, teacher_logits)
        if _has_kernel(student_logits):
            loss, stats = _LossWithGradient.apply(
                student_logits,
                teacher_logits,
                call.numbers,
                row_weight,
                labels,
                call.kind.number,
                call.vocab,
                return_stats,
                inplace_grad,
            )
        else:
            value, stats = _rows(call, row_weight != 0, return_stats)
            loss = (value * row_weight).sum()
    return (loss, _unpack_stats(stats)) if return_stats else loss


def _row_weight(
    call: _Call,
    mask: Tensor | None,
    weight: Tensor | None,
    denominator: Number | None,
    reduction: str,
) -> Tensor:
    rows = call.student.shape[:-1]
    if weight is None:
        w = torch.ones(rows, dtype=call.result, device=call.student.device)
    else:
        _check_rows("weight", weight, call.student)
        if not weight.is_floating_point():
            raise TypeError(f"weight must be floating point, got {weight.dtype}: a bool is a mask")
        if weight.requires_grad:
            raise ValueError(
                "weight is not differentiable here: detach it, or weigh ops.divergence"
            )
        w = weight.to(call.result)
    if mask is not None:
        _check_rows("mask", mask, call.student, torch.bool)
        w = torch.where(mask, w, 0)
    if isinstance(call.kind, CrossEntropy):
        w = torch.where(call.labels != -100, w, 0)
    if reduction == "sum":
        return w
    if denominator is None:
        total = w.sum()
        return torch.where(total != 0, w / total, 0)
    if not isinstance(denominator, Tensor):
        _positive("denominator", denominator)
    return (w / denominator).to(call.result)


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


class _LossWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, numbers, weight, labels, kind, vocab, want_stats, inplace):
        arguments = (teacher, numbers, weight, labels, kind, vocab, want_stats, _resident_limit)
        if inplace:
            gradient = student.detach()
            loss, stats = torch.ops.stillhouse.divergence_loss_(gradient, *arguments)
            # A C++ op does not bump the version; whoever saved these logits must raise in backward.
            torch.autograd.graph.increment_version(student)
        else:
            loss, stats, gradient = torch.ops.stillhouse.divergence_loss(student, *arguments)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(stats)
        ctx.spent = False
        return loss, stats

    @staticmethod
    def backward(ctx, upstream, _):
        if not torch.compiler.is_compiling():
            if ctx.spent:
                raise RuntimeError(
                    "the gradient of divergence_loss was handed on by its first backward pass: "
                    "compute the loss again for a second one"
                )
            ctx.spent = True
        (gradient,) = ctx.saved_tensors
        torch.ops.stillhouse.scale_(gradient, upstream)
        return gradient, *([None] * 8)


# --- the registered ops ---------------------------------------------------------------------------


def _has_kernel(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _rows(call: _Call, mask: Tensor | None, want_stats: bool) -> tuple[Tensor, Tensor]:
    if _has_kernel(call.student):
        return torch.ops.stillhouse.divergence(
            call.student,
            call.teacher,
            call.numbers,
            mask,
            call.labels,
            call.kind.number,
            call.vocab,
            want_stats,
            _resident_limit,
        )
    warnings.warn(
        f"stillhouse has no divergence kernel for {call.student.device.type}: the plain torch "
        "reference runs, with the memory and time of plain torch",
        stacklevel=3,
    )
    return reference(call, mask, want_stats)


def _fake_rows(student, want_stats, teacher=None):
    double = torch.float64 in (student.dtype, None if teacher is None else teacher.dtype)
    dtype = torch.float64 if double else torch.float32
    stats = (7, *student.shape[:-1]) if want_stats else (0,)
    return student.new_empty(student.shape[:-1], dtype=dtype), student.new_empty(stats, dtype=dtype)


@torch.library.register_fake("stillhouse::divergence")
def _(student, teacher, numbers, mask, labels, kind, vocab=-1, want_stats=False, resident_limit=-1):
    return _fake_rows(student, want_stats, teacher)


@torch.library.register_fake("stillhouse::divergence_gradient")
def _(student, teacher, numbers, weight, labels, kind, vocab=-1, resident_limit=-1):
    return student.new_empty(student.shape)


@torch.library.register_fake("stillhouse::divergence_loss")
def _(
    student, teacher, numbers, weight, labels, kind, vocab=-1, want_stats=False, resident_limit=-1
):
    value, stats = _fake_rows(student, want_stats, teacher)
    return value.new_empty(()), stats, student.new_empty(student.shape)


@torch.library.register_fake("stillhouse::divergence_loss_")
def _(
    student, teacher, numbers, weight, labels, kind, vocab=-1, want_stats=False, resident_limit=-1
):
    value, stats = _fake_rows(student, want_stats, teacher)
    return value.new_empty(()), stats


@torch.library.register_fake("stillhouse::scale_")
def _(gradient, upstream):
    return None


def _setup(ctx, inputs, output):
    student, teacher, numbers, mask, labels, ctx.kind, ctx.vocab, _, ctx.resident_limit = inputs
    ctx.save_for_backward(student, teacher, numbers, mask, labels)


# numbers with student and teacher exchanged
_EXCHANGE = [1, 0, 3, 2, 5, 4, 6, 7, 8]
_EXCHANGED_KIND = {1: 2, 2: 1, 3: 3, 4: 5, 5: 4, 7: 7}


def _backward(ctx, upstream, _):
    student, teacher, numbers, mask, labels = ctx.saved_tensors
    weight = upstream if mask is None else torch.where(mask, upstream, 0)
    gradient = torch.ops.stillhouse.divergence_gradient
    to_student = to_teacher = None
    if ctx.needs_input_grad[0]:
        to_student = gradient(
            student, teacher, numbers, weight, labels, ctx.kind, ctx.vocab, ctx.resident_limit
        )
    if ctx.needs_input_grad[1]:
        exchanged = numbers[_EXCHANGE]
        if ctx.kind == 3:  # JSD(beta) -> JSD(1 - beta)
            exchanged[8] = 1 - exchanged[8]
        vocab = min(student.shape[-1], teacher.shape[-1]) if ctx.vocab < 0 else ctx.vocab
        to_teacher = gradient(
            teacher,
            student,
            exchanged,
            weight,
            None,
            _EXCHANGED_KIND[ctx.kind],
            vocab,
            ctx.resident_limit,
        )
    return to_student, to_teacher, *([None] * 7)


def _no_second_derivative(ctx, *upstream):
    raise RuntimeError(
        "the gradient of ops.divergence has no gradient of its own (second derivative)"
    )


torch.library.register_autograd("stillhouse::divergence", _backward, setup_context=_setup)
torch.library.register_autograd("stillhouse::divergence_gradient", _no_second_derivative)


# --- the plain reference --------------------------------------------------------------------------


def reference(call: _Call, mask: Tensor | None, want_stats: bool) -> tuple[Tensor, Tensor]:
    """What the kernels compute, in plain torch: the oracle of the tests, and what runs on a device
    without a kernel. Materialises [..., V] tensors."""
    number = call.numbers.to(call.student.device, call.result).unbind()
    temperature, teacher_temperature, scale, teacher_scale, cap, teacher_cap = number[:6]
    label_weight, smoothing, a = number[6:]
    vocab = call.student.shape[-1] if call.vocab < 0 else call.vocab

    def logits(x: Tensor, scale: Tensor, cap: Tensor) -> Tensor:
        x = x[..., :vocab].to(call.result) * scale
        return cap * torch.tanh(x / cap) if cap > 0 else x

    z = logits(call.student, scale, cap)
    lq = torch.log_softmax(z / temperature, -1)
    value = torch.zeros(z.shape[:-1], dtype=call.result, device=z.device)
    stats = value.new_empty(0)
    if call.kind.needs_teacher:
        t = logits(call.teacher, teacher_scale, teacher_cap)
        target = t / teacher_temperature
        if isinstance(call.kind, TAID):
            target = _mix(a, target, z.detach() / temperature)
        lp = torch.log_softmax(target, -1)
        value = (1 - label_weight) * _REFERENCE[call.kind.number](lq, lp, a).sum(-1)
        if want_stats:
            stats = _reference_stats(lq, lp, z / temperature, target)
    if call.labels is not None:
        label_temperature = 1 if call.kind.needs_teacher else temperature
        lq = torch.log_softmax(z / label_temperature, -1)
        has_label = call.labels != -100
        hot = lq.gather(-1, call.labels.clamp(min=0)[..., None]).squeeze(-1)
        finite = lq > -torch.inf
        uniform = torch.where(finite, lq, 0).sum(-1) / finite.sum(-1)
        term = torch.where(has_label, -(1 - smoothing) * hot - smoothing * uniform, 0)
        value = value + (label_weight * term if call.kind.needs_teacher else term)
    if mask is not None:
        value = torch.where(mask, value, 0)
        stats = torch.where(mask, stats, 0) if want_stats else stats
    return value, stats


def _mix(t: Tensor, teacher: Tensor, student: Tensor) -> Tensor:
    # A weight of 0 or 1 takes one side alone: 0 * -inf is not a number.
    mixed = t * teacher + (1 - t) * student
    return torch.where(t == 0, student, torch.where(t == 1, teacher, mixed))


def _times(log_mass: Tensor, x: Tensor) -> Tensor:
    """mass * x with 0 * inf = 0, in value and gradient."""
    mass = log_mass.exp()
    return mass * torch.where(mass > 0, x, 0)


def _log_mixture(weight: Tensor, lp: Tensor, lq: Tensor) -> Tensor:
    """log(weight p + (1 - weight) q); the selects keep -inf in both from making NaN gradients."""
    shown = (lp > -torch.inf) | (lq > -torch.inf)
    x, y = torch.where(shown, lp + weight.log(), 0), torch.where(shown, lq + (1 - weight).log(), 0)
    return torch.where(shown, torch.logaddexp(x, y), -torch.inf)


def _minus(x: Tensor, y: Tensor) -> Tensor:
    """x - y where x > -inf, else 0 (its mass is zero there)."""
    shown = x > -torch.inf
    return torch.where(shown, torch.where(shown, x, 0) - torch.where(shown, y, 0), 0)


_REFERENCE = {  # kind number -> (lq, lp, parameter) -> summands [..., V]
    1: lambda lq, lp, a: _times(lp, _minus(lp, lq)),
    2: lambda lq, lp, a: _times(lq, _minus(lq, lp)),
    3: lambda lq, lp, a: (
        a * _times(lp, _minus(lp, _log_mixture(a, lp, lq)))
        + (1 - a) * _times(lq, _minus(lq, _log_mixture(a, lp, lq)))
    ),
    4: lambda lq, lp, a: _times(lp, _minus(lp, _log_mixture(a, lp, lq))),
    5: lambda lq, lp, a: _times(lq, _minus(lq, _log_mixture(1 - a, lp, lq))),
    6: lambda lq, lp, a: -_times(lp, lq),
    7: lambda lq, lp, a: (lp.exp() - lq.exp()).abs() / 2,
}


def _reference_stats(lq: Tensor, lp: Tensor, z: Tensor, t: Tensor) -> Tensor:
    q, p = lq.exp(), lp.exp()
    return torch.stack(
        [
            torch.minimum(p, q).sum(-1),
            (z.argmax(-1) == t.argmax(-1)).to(q.dtype),
            -_times(lq, lq).sum(-1),
            -_times(lp, lp).sum(-1),
            z.logsumexp(-1),
            t.logsumexp(-1),
            torch.where(q < p, q, 0).sum(-1),
        ]
    )
