"""Every kind at one shape, beside its eager form and beside our own forward KL in the same rounds.

The family `divergence` measures two kinds closely, this one measures all of them at the shape of a
language model's batch: what does a kind cost, compared with the one that everybody knows?
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from . import divergence
from .divergence import DTYPES, FORMS, MAIN_SHAPE, OURS, runners, warmed_up
from .grid import Cell, Provider

__all__ = ["NAME", "OURS", "PROVIDERS", "grid", "memory_call", "runners"]

NAME = "kinds"
FORWARD_KL = "forward_kl"


def _logs(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    log_q = F.log_softmax(student, -1, dtype=torch.float32)
    return log_q, F.log_softmax(teacher, -1, dtype=torch.float32)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(share), log_q + math.log(1 - share))


# What a user of plain torch would write, in float32 within; value [N] each.


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _logs(student, teacher)
    return _kl(log_q, log_p)


def symmetric_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _logs(student, teacher)
    return 0.5 * (_kl(log_p, log_q) + _kl(log_q, log_p))


def skew_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _logs(student, teacher)
    return _kl(log_p, _mixture(log_p, log_q, 0.1))


def skew_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _logs(student, teacher)
    return _kl(log_q, _mixture(log_q, log_p, 0.1))


def taid(student: Tensor, teacher: Tensor) -> Tensor:
    log_q = F.log_softmax(student, -1, dtype=torch.float32)
    target = F.softmax(0.6 * student.detach() + 0.4 * teacher, -1, dtype=torch.float32)
    return -(target * log_q).sum(-1)


def tvd(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (F.softmax(x, -1, dtype=torch.float32) for x in (student, teacher))
    return 0.5 * (p - q).abs().sum(-1)


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    target = F.softmax(teacher, -1, dtype=torch.float32)
    return F.cross_entropy(student.float(), target, reduction="none")


def hellinger(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _logs(student, teacher)
    return ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1)


def chi2(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _logs(student, teacher)
    return (2 * log_p - log_q).exp().sum(-1) - 1


def log_acceptance(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (F.softmax(x, -1, dtype=torch.float32) for x in (student, teacher))
    return -torch.minimum(p, q).sum(-1).log()


def alpha_beta(student: Tensor, teacher: Tensor, a: float = 0.2, b: float = 0.7) -> Tensor:
    log_q, log_p = _logs(student, teacher)
    s = a + b
    both = (a * log_p + b * log_q).exp()
    return -(both - a / s * (s * log_p).exp() - b / s * (s * log_q).exp()).sum(-1) / (a * b)


def amari(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _logs(student, teacher)
    return 4 * (1 - (0.5 * log_p + 0.5 * log_q).exp().sum(-1))


def renyi(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _logs(student, teacher)
    return -2 * (0.5 * log_p + 0.5 * log_q).logsumexp(-1)


def mse_logits(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student.float(), teacher.float(), reduction="none").mean(-1)


def mse_centered(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.float() - teacher.float()).var(-1, unbiased=False)


def mse_log_probs(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _logs(student, teacher)
    return (log_q - log_p).square().mean(-1)


def cosine_logits(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def cosine_probs(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (F.softmax(x, -1, dtype=torch.float32) for x in (student, teacher))
    return 1 - F.cosine_similarity(q, p, dim=-1)


def standardized_kl(student: Tensor, teacher: Tensor) -> Tensor:
    def standardize(x: Tensor) -> Tensor:
        std, mean = torch.std_mean(x.float(), -1, keepdim=True)
        return (x - mean) / std

    log_q, log_p = _logs(standardize(student), standardize(teacher))
    return _kl(log_p, log_q)


def adaptive_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _logs(student, teacher)
    with torch.no_grad():
        p, gap = log_p.exp(), (log_p.exp() - log_q.exp()).abs()
        ordered, columns = p.sort(-1, descending=True)
        in_head = ordered.cumsum(-1) <= 0.5
        in_head[..., 0] = True
        of_head = (gap.gather(-1, columns) * in_head).sum(-1)
        weight = of_head / gap.sum(-1)
    return weight * _kl(log_p, log_q) + (1 - weight) * _kl(log_q, log_p)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    student, teacher = student.float(), teacher.float()
    q, p = F.softmax(student, -1), F.softmax(teacher, -1)
    y = labels[:, None]
    q_y, p_y = q.gather(-1, y), p.gather(-1, y)
    two_q, two_p = torch.cat([q_y, 1 - q_y], -1), torch.cat([p_y, 1 - p_y], -1)
    hide = F.one_hot(labels, student.shape[-1]) * -1000.0
    rest = _kl(F.log_softmax(teacher + hide, -1), F.log_softmax(student + hide, -1))
    return (two_p * (two_p.log() - two_q.log())).sum(-1) + 8 * rest


def uld(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (F.softmax(x, -1, dtype=torch.float32) for x in (student, teacher))
    return (q.sort(-1, descending=True).values - p.sort(-1, descending=True).values).abs().sum(-1)


def cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(student.float(), labels, reduction="none")


# Kind as ops writes it -> its eager form.
PLAIN: dict[str, Callable] = {
    "ReverseKL()": reverse_kl,
    "SymmetricKL()": symmetric_kl,
    "JSD()": divergence.plain_jsd,
    "SkewKL()": skew_kl,
    "SkewReverseKL()": skew_reverse_kl,
    "TAID(0.4)": taid,
    "TVD()": tvd,
    "SoftCrossEntropy()": soft_cross_entropy,
    "Hellinger()": hellinger,
    "Chi2()": chi2,
    "LogAcceptance()": log_acceptance,
    "AlphaBeta()": alpha_beta,
    "Amari()": amari,
    "Renyi()": renyi,
    "DKD()": dkd,
    "MSELogits()": mse_logits,
    "MSELogits('centered')": mse_centered,
    "MSELogits('log_probs')": mse_log_probs,
    "CosineLogits()": cosine_logits,
    "CosineProbs()": cosine_probs,
    "StandardizedKL()": standardized_kl,
    "AdaptiveKL()": adaptive_kl,
    "ULD()": uld,
    "CrossEntropy()": cross_entropy,
}


def grid() -> list[Cell]:
    """Every kind, in both forms and dtypes, at the main shape."""
    return [
        Cell(NAME, kind, form, dtype, *MAIN_SHAPE)
        for kind, dtype, form in itertools.product(PLAIN, DTYPES, FORMS)
    ]


@cache
def _labels(cell: Cell, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, cell.columns, (cell.rows,), generator=generator).to(device)


def _ours(cell: Cell, kind: object) -> Callable[[Tensor, Tensor], Tensor]:
    from stillhouse import ops

    op = partial(ops.divergence, kind=kind)
    if cell.form == "loss":
        op = partial(ops.divergence_loss, kind=kind, inplace_grad=True)
    if not kind.needs_labels:
        return op

    def labelled(student: Tensor, teacher: Tensor) -> Tensor:
        shown = teacher if kind.needs_teacher else None
        return op(student, shown, labels=_labels(cell, student.device))

    return labelled


def build_ours(cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
    """The fused op."""
    from stillhouse import ops

    name, _, parameters = cell.kind.rstrip(")").partition("(")
    parsed = [float(p) if p[0].isdigit() else p.strip("'") for p in parameters.split(", ") if p]
    return _ours(cell, getattr(ops, name)(*parsed))


def build_forward_kl(cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
    """Our forward KL, to compare with."""
    from stillhouse import ops

    return _ours(cell, ops.ForwardKL())


def build_eager(cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
    """Eager torch."""
    rows = PLAIN[cell.kind]
    if rows in (dkd, cross_entropy):
        with_labels = rows

        def rows(student: Tensor, teacher: Tensor) -> Tensor:
            return with_labels(student, teacher, _labels(cell, student.device))

    return rows if cell.form == "row" else lambda student, teacher: rows(student, teacher).mean()


PROVIDERS = (
    Provider(OURS, build_ours, in_place=True),
    Provider(FORWARD_KL, build_forward_kl, in_place=True),
    Provider("eager", build_eager),
)


def memory_call(
    cell: Cell, name: str, threads: int, device: str
) -> tuple[Callable[[], object], int]:
    """For `measure.peak_memory`: the warmed-up call, and the bytes of its fresh gradient."""
    provider = next(provider for provider in PROVIDERS if provider.name == name)
    return warmed_up(provider, cell, threads, device)
