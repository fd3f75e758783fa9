"""The family of sparse teachers: the largest 64 probabilities of each row instead of its logits.

Beside ours: the dense kernel of the same kind (of forward KL, for the kind that has none), and
eager torch on the same 64 columns. The floor is that of dense divergences: a copy of two reads and
one write of [N, V].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .divergence import DTYPES, FORMS, MAIN_SHAPE, OURS, make_logits, runners, warmed_up
from .grid import Cell, Provider

__all__ = ["NAME", "OURS", "PROVIDERS", "grid", "memory_call", "runners"]

NAME = "sparse"
K = 64
KINDS = (
    ("ForwardKL()", "bucket"),
    ("ForwardKL()", "renormalize"),
    ("ForwardKL()", "uniform"),
    ("ReverseKL()", "bucket"),
    ("JSD()", "bucket"),
    ("TVD()", "bucket"),
    ("SupportKL()", "bucket"),
)


def grid() -> list[Cell]:
    """Every cell; the tail is a part of the kind's name."""
    return [
        Cell(NAME, f"{kind} {tail}", form, dtype, *MAIN_SHAPE)
        for (kind, tail), dtype, form in itertools.product(KINDS, DTYPES, FORMS)
    ]


@cache
def _teacher(cell: Cell, device: str) -> object:
    from stillhouse import ops

    _, teacher = make_logits(cell, device)
    return ops.SparseTeacher.from_logits(teacher, k=K, tail=cell.kind.split()[1])


def _op(cell: Cell, name: str) -> Callable[..., Tensor]:
    from stillhouse import ops

    kind = getattr(ops, name.rstrip("()"))()
    if cell.form == "row":
        return partial(ops.divergence, kind=kind)
    return partial(ops.divergence_loss, kind=kind, inplace_grad=True)


def build_ours(cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
    """The fused op on 64 columns; the teacher's logits are not looked at."""
    op = _op(cell, cell.kind.split()[0])
    return lambda student, teacher: op(student, _teacher(cell, str(student.device)))


def build_dense(cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
    """The fused op on whole rows."""
    name = cell.kind.split()[0]
    return _op(cell, "ForwardKL" if name == "SupportKL()" else name)


def build_eager(cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
    """Eager torch on 64 columns."""
    name, tail = cell.kind.split()

    def outcomes(student: Tensor, teacher: object) -> tuple[Tensor, Tensor]:
        ids, log_p = teacher.ids.long(), teacher.log_probs
        if name == "SupportKL()":
            return F.log_softmax(student.gather(-1, ids).float(), -1), F.log_softmax(log_p, -1)
        log_q = F.log_softmax(student, -1, dtype=torch.float32)
        if tail == "uniform":
            return log_q, teacher.to_dense()
        known = log_q.gather(-1, ids)
        if tail == "renormalize":
            return known, F.log_softmax(log_p, -1)
        q_rest = (1 - known.exp().sum(-1, keepdim=True)).clamp(min=1e-9)
        p_rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=1e-9)
        return torch.cat([known, q_rest.log()], -1), torch.cat([log_p, p_rest.log()], -1)

    def rows(student: Tensor, _: Tensor) -> Tensor:
        log_q, log_p = outcomes(student, _teacher(cell, str(student.device)))
        if name == "ReverseKL()":
            return (log_q.exp() * (log_q - log_p)).sum(-1)
        if name == "TVD()":
            return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
        if name == "JSD()":
            p, q = log_p.exp(), log_q.exp()
            log_m = ((p + q) / 2).log()
            return 0.5 * (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    return rows if cell.form == "row" else lambda *logits: rows(*logits).mean()


PROVIDERS = (
    Provider(OURS, build_ours, in_place=True),
    Provider("dense", build_dense, in_place=True),
    Provider("eager", build_eager),
)


def memory_call(
    cell: Cell, name: str, threads: int, device: str
) -> tuple[Callable[[], object], int]:
    """For `measure.peak_memory`: the warmed-up call, and the bytes of its fresh gradient."""
    provider = next(provider for provider in PROVIDERS if provider.name == name)
    call, gradient = warmed_up(provider, cell, threads, device)
    _teacher(cell, device)  # an input, as the logits are
    return call, gradient
