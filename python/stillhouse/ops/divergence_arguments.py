"""The checked arguments of a divergence call, as the registered ops take them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .kinds import CrossEntropy, Kind, Number, SupportKL, as_kind
from .sparse_teacher import TAILS, SparseTeacher

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Call(NamedTuple):
    """The checked arguments of one call, as the registered ops take them."""

    student: Tensor
    teacher: Tensor | None
    kind: Kind
    numbers: Tensor
    labels: Tensor | None
    vocab: int
    result: torch.dtype
    ids: Tensor | None = None  # of a sparse teacher, whose log-probabilities `teacher` then is
    tail: int = 0


def _check_logits(name: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., V] with V >= 1, got {tuple(logits.shape)}")


def check_rows(name: str, x: Tensor, student: Tensor, dtype: torch.dtype | None = None) -> None:
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


def positive(name: str, value: Number) -> Number:
    if not isinstance(value, Tensor) and not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value}")
    return value


def _for_each_side(name: str, value: object, none: float) -> tuple[Number, Number]:
    """One number serves both sides, a pair is (student, teacher)."""
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a number or a pair (student, teacher), got {value}")
    student, teacher = (none if v is None else positive(name, v) for v in pair)
    return student, teacher


def pack(numbers: list[Number]) -> Tensor:
    if any(isinstance(n, Tensor) for n in numbers):
        return torch.stack(
            [torch.as_tensor(n).detach().to("cpu", torch.float64).reshape(()) for n in numbers]
        )
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")  # whatever the default is


def check_call(
    student: Tensor,
    teacher: Tensor | SparseTeacher | None,
    kind: str | Kind,
    temperature: Number,
    teacher_temperature: Number | None,
    vocab_size: int | None,
    logit_softcap: object,
    logit_scale: object,
    labels: Tensor | None,
    label_weight: Number,
) -> Call:
    kind = as_kind(kind)
    _check_logits("student_logits", student)
    width = student.shape[-1]
    result = torch.float64 if student.dtype == torch.float64 else torch.float32
    sparse = teacher if isinstance(teacher, SparseTeacher) else None
    if isinstance(kind, SupportKL) and sparse is None:
        raise ValueError("SupportKL compares the columns that an ops.SparseTeacher knows: pass one")
    if sparse is not None:
        _check_sparse(sparse, student, kind, vocab_size)
        teacher, width = sparse.log_probs, sparse.vocab_size
        if teacher.dtype == torch.float64:
            result = torch.float64
    elif kind.needs_teacher:
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
        if teacher.shape[-1] != width and vocab_size is None and kind.pairs_columns:
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
        check_rows("labels", labels, student, torch.int64)
    elif kind.needs_labels:
        raise ValueError(f"{type(kind).__name__} needs labels: int64, one a row, -100 for none")
    if not isinstance(label_weight, Tensor) and not 0 <= label_weight <= 1:
        raise ValueError(f"label_weight must lie in [0, 1], got {label_weight}")

    if teacher_temperature is None:
        teacher_temperature = temperature
    if sparse is not None:
        # A number that is not a pair is meant for logits, which this teacher has none of.
        logit_scale, logit_softcap = (
            x if isinstance(x, tuple) else (x, none)
            for x, none in ((logit_scale, 1.0), (logit_softcap, None))
        )
        if logit_scale[1:] != (1.0,) or logit_softcap[1:] != (None,):
            raise ValueError(
                "a SparseTeacher has probabilities, no logits: its logit_scale is 1.0 and its "
                "logit_softcap None"
            )
        teacher_temperature = _relative_temperature(sparse, kind, teacher_temperature)
    student_scale, teacher_scale = _for_each_side("logit_scale", logit_scale, 1.0)
    student_cap, teacher_cap = _for_each_side("logit_softcap", logit_softcap, 0.0)
    numbers = [
        positive("temperature", temperature),
        positive("teacher_temperature", teacher_temperature),
        student_scale,
        teacher_scale,
        student_cap,
        teacher_cap,
        label_weight,
        kind.label_smoothing if isinstance(kind, CrossEntropy) else 0.0,
        *((0.0, 0.0) if isinstance(kind, CrossEntropy) else kind.parameters),
        kind.factor(width if vocab_size is None else vocab_size),
    ]
    vocab = -1 if vocab_size is None else vocab_size
    call = Call(student, teacher, kind, pack(numbers), labels, vocab, result)
    if sparse is None:
        return call
    ids, log_probs = sparse.packed()
    return call._replace(teacher=log_probs, ids=ids, tail=TAILS.index(sparse.tail))


def _check_sparse(
    teacher: SparseTeacher, student: Tensor, kind: Kind, vocab_size: int | None
) -> None:
    name, rows = type(kind).__name__, teacher.ids.shape[:-1]
    if teacher.log_probs.requires_grad:
        raise ValueError("a SparseTeacher has no gradient: detach its log_probs")
    if teacher.tail not in kind.sparse_tails:
        known = ", ".join(kind.sparse_tails)
        raise ValueError(
            f'{name} cannot be taken to a SparseTeacher with tail="{teacher.tail}"'
            + (f", only with {known}" if known else " or any other: it needs whole rows")
        )
    if rows != student.shape[:-1]:
        raise ValueError(
            f"student and teacher must have the same rows, got {tuple(student.shape)} and ids "
            f"{tuple(teacher.ids.shape)}"
        )
    if teacher.ids.device != student.device:
        raise ValueError(f"teacher is on {teacher.ids.device}, the student on {student.device}")
    if vocab_size is None and student.shape[-1] != teacher.vocab_size:
        raise ValueError(
            f"student has {student.shape[-1]} columns and the teacher's vocabulary "
            f"{teacher.vocab_size}: pass vocab_size={teacher.vocab_size} if the others are padding"
        )
    if vocab_size is not None and vocab_size != teacher.vocab_size:
        raise ValueError(
            f"vocab_size must be the sparse teacher's {teacher.vocab_size}, got {vocab_size}: what "
            "its probabilities would be over other columns is not known"
        )
    if teacher.vocab_size > student.shape[-1]:
        raise ValueError(
            f"the teacher's vocabulary has {teacher.vocab_size} columns, the student only "
            f"{student.shape[-1]}"
        )


def _relative_temperature(teacher: SparseTeacher, kind: Kind, wanted: Number) -> Number:
    """By what the teacher's log-probabilities are still to be divided."""
    ratio = positive("teacher_temperature", wanted) / teacher.temperature
    retempers = teacher.tail in ("renormalize", "uniform") or isinstance(kind, SupportKL)
    if not retempers and not isinstance(ratio, Tensor) and ratio != 1:
        raise ValueError(
            f'a SparseTeacher with tail="{teacher.tail}" made at temperature '
            f"{teacher.temperature:g} cannot be used at {wanted:g}: how its tail would change is "
            'not known. Pass teacher_temperature=, make it at that temperature, or take "uniform" '
            'or "renormalize"'
        )
    return ratio


def check_labels(call: Call) -> None:
    """In the row form only a kind that needs labels takes them."""
    if call.labels is not None and not call.kind.needs_labels:
        raise ValueError(
            f"{type(call.kind).__name__} takes no labels: CrossEntropy and DKD do, and the loss "
            "form mixes a label term with label_weight="
        )


def loss_weight(
    call: Call,
    mask: Tensor | None,
    weight: Tensor | None,
    denominator: Number | None,
    reduction: str,
    label_weight: Number,
) -> Tensor:
    """What the loss form multiplies each row by: weight and mask over the denominator."""
    if call.labels is None and isinstance(label_weight, float | int) and label_weight > 0:
        raise ValueError(f"label_weight={label_weight} needs labels")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    if reduction == "sum" and denominator is not None:
        raise ValueError('denominator goes with reduction="mean": a sum is not divided')
    rows = call.student.shape[:-1]
    if weight is None:
        w = torch.ones(rows, dtype=call.result, device=call.student.device)
    else:
        check_rows("weight", weight, call.student)
        if not weight.is_floating_point():
            raise TypeError(f"weight must be floating point, got {weight.dtype}: a bool is a mask")
        if weight.requires_grad:
            raise ValueError(
                "weight is not differentiable here: detach it, or weigh the row form's values"
            )
        w = weight.to(call.result)
    if mask is not None:
        check_rows("mask", mask, call.student, torch.bool)
        w = torch.where(mask, w, 0)
    if call.kind.needs_labels:
        w = torch.where(call.labels != -100, w, 0)
    if reduction == "sum":
        return w
    if denominator is None:
        total = w.sum()
        return torch.where(total != 0, w / total, 0)
    if not isinstance(denominator, Tensor):
        positive("denominator", denominator)
    return (w / denominator).to(call.result)
