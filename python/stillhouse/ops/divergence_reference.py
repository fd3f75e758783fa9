"""What the divergence kernels compute, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence_arguments import Call
from .kinds import DKD, TAID, ULD, SupportKL
from .sparse_teacher import TAILS, log_of_rest


def reference(call: Call, mask: Tensor | None, want_stats: bool) -> tuple[Tensor, Tensor]:
    """What the kernels compute, in plain torch: the oracle of the tests, and what runs on a device
    without a kernel. Materialises [..., V] tensors."""
    number = call.numbers.to(call.student.device, call.result).unbind()
    temperature, teacher_temperature, scale, teacher_scale, cap, teacher_cap = number[:6]
    label_weight, smoothing, a, b, factor = number[6:]
    vocab = call.student.shape[-1] if call.vocab < 0 else call.vocab

    def logits(x: Tensor, scale: Tensor, cap: Tensor, vocab: int | None = vocab) -> Tensor:
        x = x[..., :vocab].to(call.result) * scale
        return cap * torch.tanh(x / cap) if cap > 0 else x

    z = logits(call.student, scale, cap)
    lq = torch.log_softmax(z / temperature, -1)
    value = torch.zeros(z.shape[:-1], dtype=call.result, device=z.device)
    stats = _student_stats(lq, z / temperature) if want_stats else value.new_empty(0)
    if call.ids is not None:
        value, of_sparse = _of_sparse(call, z / temperature, teacher_temperature, a, b)
        stats = of_sparse if want_stats else stats
        value = (1 - label_weight) * factor * value
    elif call.kind.needs_teacher:
        every = call.vocab < 0 and not call.kind.pairs_columns
        t = logits(call.teacher, teacher_scale, teacher_cap, None if every else vocab)
        number = call.kind.kernel_number
        if number == _STANDARDIZED:
            z, t = _standardize(z), _standardize(t)
        target = t / teacher_temperature
        if isinstance(call.kind, TAID):
            target = mix(a, target, z.detach() / temperature)
        lp = torch.log_softmax(target, -1)
        lq = torch.log_softmax(z / temperature, -1)
        if number in _OF_LOGITS:
            value = _OF_LOGITS[number](z / temperature, target, a)
        elif isinstance(call.kind, ULD):
            value = _of_sorted(lq.exp(), lp.exp())
        elif isinstance(call.kind, DKD):
            value = _decoupled(lq, lp, call.labels.clamp(min=0), a, b)
            mask = _and(mask, call.labels != -100)
        else:
            value = _REFERENCE[number](lq, lp, a, b).sum(-1)
        if number in _FINISH:
            value = _FINISH[number](value, a)
        value = (1 - label_weight) * factor * value
        if want_stats:
            stats = _reference_stats(lq, lp, z / temperature, target, call.kind.pairs_columns)
    if call.labels is not None and (label_weight > 0 or not call.kind.needs_teacher):
        label_temperature = 1 if call.kind.needs_teacher else temperature
        lq = torch.log_softmax(z / label_temperature, -1)
        has_label = call.labels != -100
        hot = lq.gather(-1, call.labels.clamp(min=0)[..., None]).squeeze(-1)
        finite = lq > -torch.inf
        uniform = torch.where(finite, lq, 0).sum(-1) / finite.sum(-1)
        if not call.kind.needs_teacher:
            stats = torch.where(has_label, stats, 0) if want_stats else stats
        term = torch.where(has_label, -(1 - smoothing) * hot - smoothing * uniform, 0)
        value = value + (label_weight * term if call.kind.needs_teacher else term)
    if mask is not None:
        value = torch.where(mask, value, 0)
        stats = torch.where(mask, stats, 0) if want_stats else stats
    return value, stats


def _outcomes(call: Call, z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [..., k + 1] of student and teacher: of the columns that the teacher knows
    and of all others together; or [..., V], where it shares out what the others have. The teacher's
    are still to be normalised."""
    lq, present, tail = z.log_softmax(-1), call.ids >= 0, TAILS[call.tail]
    columns = torch.where(present, call.ids, 0).long()
    log_probs = call.teacher.to(call.result)
    known = torch.where(present, log_probs, -torch.inf)
    # Columns that are none add nothing to column 0.
    is_known = torch.zeros_like(lq).scatter_add(-1, columns, present.to(lq.dtype)) > 0
    given = torch.where(call.ids == -2, log_probs, 0).sum(-1, keepdim=True)
    rest = torch.where((call.ids == -2).any(-1, keepdim=True), given, log_of_rest(known, None))
    rest = torch.where(is_known.all(-1, keepdim=True), -torch.inf, rest).to(call.result)
    at_known = torch.where(present, z.gather(-1, columns), -torch.inf)
    if isinstance(call.kind, SupportKL):
        return at_known, known / temperature
    if tail == "uniform":
        others = (~is_known).sum(-1, keepdim=True).clamp(min=1)
        share = rest - others.to(call.result).log()
        spread = torch.full_like(lq, -torch.inf).scatter_reduce(-1, columns, known, "amax")
        return z, torch.where(is_known, spread, share) / temperature
    of_rest = z.masked_fill(is_known, -torch.inf).logsumexp(-1, keepdim=True)
    if tail != "bucket":
        rest = torch.full_like(rest, -torch.inf)
    if tail != "renormalize" and temperature != 1:
        raise RuntimeError(f'the tail "{tail}" of a sparse teacher is known at its own temperature')
    return torch.cat([at_known, of_rest], -1), torch.cat([known / temperature, rest], -1)


def _of_sparse(
    call: Call, z: Tensor, temperature: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    of_student, of_teacher = _outcomes(call, z, temperature)
    normalised = TAILS[call.tail] != "drop" or isinstance(call.kind, SupportKL)
    lq, lp = of_student.log_softmax(-1), of_teacher.log_softmax(-1) if normalised else of_teacher
    number = call.kind.kernel_number
    value = _REFERENCE[number](lq, lp, a, b).sum(-1)
    if number in _FINISH:
        value = _FINISH[number](value, a)
    if isinstance(call.kind, SupportKL):  # of no column there is nothing to compare
        value = torch.where((call.ids >= 0).any(-1), value, 0)
    stats = _reference_stats(lq, lp, of_student, of_teacher, True)
    if not normalised:
        stats[5] = 0
    # The top columns are compared, the lower of equal ones; the entropy is that of all columns.
    known = torch.full_like(z, -torch.inf)
    columns, present = call.ids.clamp(min=0).long(), call.ids >= 0
    log_probs = torch.where(present, call.teacher.to(z.dtype), -torch.inf)
    known = known.scatter_reduce(-1, columns, log_probs, "amax")
    shown = z
    if isinstance(call.kind, SupportKL):
        shown = z.masked_fill(known == -torch.inf, -torch.inf)
    else:
        stats[2] = _student_stats(z.log_softmax(-1), z)[2]
    stats[1] = (shown.argmax(-1) == known.argmax(-1)).to(value.dtype)
    return value, stats


def mix(t: Tensor, teacher: Tensor, student: Tensor) -> Tensor:
    """TAID's target, (1 - t) student + t teacher."""
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


def _and(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask & other


def _head(lp: Tensor, mu: Tensor) -> Tensor:
    """Bool [..., V]: the largest probabilities, equal ones by column, whose sum stays within mu."""
    ordered, columns = lp.exp().sort(dim=-1, descending=True, stable=True)
    head = ordered.cumsum(-1) <= mu
    head[..., 0] = True
    return torch.zeros_like(head).scatter(-1, columns, head)


def _adaptive_kl(lq: Tensor, lp: Tensor, mu: Tensor) -> Tensor:
    gap = (lp.exp() - lq.detach().exp()).abs()
    of_tail = torch.where(_head(lp, mu), 0, gap).sum(-1, keepdim=True)
    weight = of_tail / gap.sum(-1, keepdim=True).clamp(min=torch.finfo(gap.dtype).tiny)
    return (1 - weight) * _times(lp, _minus(lp, lq)) + weight * _times(lq, _minus(lq, lp))


def _decoupled(lq: Tensor, lp: Tensor, labels: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = labels[..., None]
    is_label = torch.zeros_like(lq, dtype=torch.bool).scatter(-1, y, True)

    def parts(log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of {y, the rest}, and of the columns within the rest."""
        rest = log_p.masked_fill(is_label, -torch.inf)
        total = rest.logsumexp(-1, keepdim=True)
        return torch.cat([log_p.gather(-1, y), total], -1), rest - total

    (q2, q_rest), (p2, p_rest) = parts(lq), parts(lp)
    two = _times(p2, _minus(p2, q2)).sum(-1)
    rest = _times(p_rest, _minus(p_rest, q_rest)).sum(-1)
    return a * two + b * rest


def _of_sorted(q: Tensor, p: Tensor) -> Tensor:
    q, p = (x.sort(dim=-1, descending=True, stable=True).values for x in (q, p))
    width = max(q.shape[-1], p.shape[-1])
    q, p = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (q, p))
    return (q - p).abs().sum(-1)


def _power(lp: Tensor, lq: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """p^a q^b, 0 where both sides have no mass."""
    shown = (lp > -torch.inf) | (lq > -torch.inf)

    def times_log(c, x):  # with 0 * -inf = 0
        return c * torch.where(shown, x, 0) if c != 0 else 0 * x.detach().clamp(min=0)

    return torch.where(shown, (times_log(a, lp) + times_log(b, lq)).exp(), 0)


def _alpha_beta(lq: Tensor, lp: Tensor, a: Tensor, b: Tensor) -> Tensor:
    s = a + b
    P, Q, gap = _power(lp, lq, s, 0), _power(lp, lq, 0, s), _minus(lq, lp)
    if a == 0 and b == 0:
        return Q * gap**2 / 2
    if a == 0:
        return (b * Q * gap - Q + P) / b**2
    if b == 0:
        return (-a * P * gap - P + Q) / a**2
    if s == 0:
        return (a * Q * gap + _power(lp, lq, a, b) - Q) / a**2
    return -(_power(lp, lq, a, b) - a / s * P - b / s * Q) / (a * b)


_REFERENCE = {  # kind number -> (lq, lp, two parameters) -> summands [..., V]
    1: lambda lq, lp, a, b: _times(lp, _minus(lp, lq)),
    2: lambda lq, lp, a, b: _times(lq, _minus(lq, lp)),
    3: lambda lq, lp, a, b: (
        a * _times(lp, _minus(lp, _log_mixture(a, lp, lq)))
        + (1 - a) * _times(lq, _minus(lq, _log_mixture(a, lp, lq)))
    ),
    4: lambda lq, lp, a, b: _times(lp, _minus(lp, _log_mixture(a, lp, lq))),
    5: lambda lq, lp, a, b: _times(lq, _minus(lq, _log_mixture(1 - a, lp, lq))),
    6: lambda lq, lp, a, b: -_times(lp, lq),
    7: lambda lq, lp, a, b: (lp.exp() - lq.exp()).abs() / 2,
    8: lambda lq, lp, a, b: -_times(lp, lq),
    9: lambda lq, lp, a, b: (1 - a) * _times(lp, _minus(lp, lq)) + a * _times(lq, _minus(lq, lp)),
    10: lambda lq, lp, a, b: (_power(lp, lq, 0.5, 0) - _power(lp, lq, 0, 0.5)) ** 2,
    11: lambda lq, lp, a, b: _power(lp, lq, 2, -1) - lq.exp(),
    12: lambda lq, lp, a, b: torch.minimum(lp.exp(), lq.exp()),
    13: lambda lq, lp, a, b: _alpha_beta(lq, lp, a, b),
    14: lambda lq, lp, a, b: (_power(lp, lq, a, 1 - a) - lq.exp()) / (a * (a - 1)),
    15: lambda lq, lp, a, b: _power(lp, lq, a, 1 - a),
}
_REFERENCE[19] = _REFERENCE[25] = _REFERENCE[1]
_REFERENCE[23] = _REFERENCE[13]
_REFERENCE[24] = lambda lq, lp, a, b: _minus(lq, lp).square()
_REFERENCE[20] = lambda lq, lp, a, b: _adaptive_kl(lq, lp, a)
_STANDARDIZED = 19


def _finite(x: Tensor) -> Tensor:
    return torch.where(x > -torch.inf, x, 0)


def _centered(x: Tensor) -> Tensor:
    count = (x != -torch.inf).sum(-1, keepdim=True)
    return x - _finite(x).sum(-1, keepdim=True) / count


def _standardize(x: Tensor) -> Tensor:
    count = (x != -torch.inf).sum(-1, keepdim=True)
    centered = _centered(x)
    variance = _finite(centered).square().sum(-1, keepdim=True) / (count - 1)
    return torch.where(x > -torch.inf, _finite(centered) / variance.sqrt(), -torch.inf)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return 1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


_OF_LOGITS = {  # kind number -> (tempered logits of student and teacher, parameter) -> [...]
    16: lambda z, t, a: (
        (_minus(_centered(z), _centered(t)) if a else _minus(z, t)).square().sum(-1)
    ),
    17: lambda z, t, a: _cosine(_finite(z), _finite(t)),
    18: lambda z, t, a: _cosine(z.softmax(-1), t.softmax(-1)),
}
# Kinds that are a function of such a sum.
_FINISH = {12: lambda x, a: -x.log(), 15: lambda x, a: x.log() / (a - 1)}


def _student_stats(lq: Tensor, z: Tensor) -> Tensor:
    none = torch.full_like(z[..., 0], torch.nan)
    return torch.stack([none, none, -_times(lq, lq).sum(-1), none, z.logsumexp(-1), none, none])


def _reference_stats(lq: Tensor, lp: Tensor, z: Tensor, t: Tensor, paired: bool) -> Tensor:
    if not paired:
        stats = _student_stats(lq, z)
        stats[3], stats[5] = -_times(lp, lp).sum(-1), t.logsumexp(-1)
        return stats
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
