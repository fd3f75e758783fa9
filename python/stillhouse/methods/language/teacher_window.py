"""The KL to the part of a teacher's distribution that lies inside of a window, given or learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, logsigmoid

from stillhouse import ops

# A class of probability 0 is no better known than one of e^-30, and the network takes no infinity.
SMALLEST = -30.0


def clipped_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    lower: float | Tensor,
    upper: float | Tensor,
    *,
    coordinate: str = "mass",
    softness: float = 0.05,
    keep: Tensor | None = None,
) -> Tensor:
    """KL(p' || q) of each row, p' the teacher inside of the window (lower, upper).

    student_logits, teacher_logits: [..., V], any float dtype each; lower, upper: numbers, or
    tensors [...] with a gradient. coordinate: "mass", of the classes in the order of the teacher's
    probabilities, or "rank", (k + 1/2) / V of the k-th. keep: int64 [...] or [..., n], classes that
    are never clipped, as the likeliest one never is; -100 = none.
    Returns float32 [...] (float64 for float64 logits). The gradient goes to the student, q - p',
    and to the window. Raises ValueError for lower >= upper, a window outside [0, 1], softness that
    is not positive, an unknown coordinate, classes that do not exist, shapes that do not match, and
    a teacher that requires a gradient.

    Defaults: softness 0.05 and the coordinate are ours.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import clipped_kl
        >>> student = torch.zeros(1, 4, requires_grad=True)
        >>> teacher = torch.tensor([[0.6, 0.3, 0.06, 0.04]]).log()
        >>> loss = clipped_kl(student, teacher, 0.0, 0.9, softness=0.001)
        >>> round(loss.item(), 4)  # ln 4 - H(2/3, 1/3)
        0.7498
    """
    log_mask = _log_window(teacher_logits, lower, upper, coordinate, softness, keep)
    return ops.divergence(student_logits, teacher_logits + log_mask, "forward_kl")


def _log_window(
    teacher_logits: Tensor,
    lower: float | Tensor,
    upper: float | Tensor,
    coordinate: str,
    softness: float,
    keep: Tensor | None,
) -> Tensor:
    """log m, [..., V]."""
    if coordinate not in ("mass", "rank"):
        raise ValueError(f"coordinate must be 'mass' or 'rank', got {coordinate!r}")
    if not 0 < softness < float("inf"):
        raise ValueError(f"softness must be a positive number, got {softness}")
    if teacher_logits.requires_grad:
        raise ValueError("no gradient flows to the teacher: detach its logits")
    if teacher_logits.dtype != torch.float64:
        teacher_logits = teacher_logits.float()
    rows, columns = teacher_logits.shape[:-1], teacher_logits.shape[-1]
    low, high = (torch.as_tensor(x).to(teacher_logits) for x in (lower, upper))
    if not bool(((low >= 0) & (low < high) & (high <= 1)).all()):
        raise ValueError("a window must have 0 <= lower < upper <= 1 in every row")
    ranked, order = teacher_logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if coordinate == "mass":
        place = ranked.cumsum(-1) - ranked / 2
    else:
        place = ((torch.arange(columns).to(ranked) + 0.5) / columns).expand_as(ranked)
    place = torch.empty_like(ranked).scatter(-1, order, place)
    low, high = (x.expand(rows)[..., None] for x in (low, high))
    log_mask = logsigmoid((place - low) / softness) + logsigmoid((high - place) / softness)
    kept = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order[..., :1], True)
    if keep is not None:
        keep = keep if keep.dim() == order.dim() else keep[..., None]
        if bool(((keep >= columns) | ((keep < 0) & (keep != -100))).any()):
            raise ValueError(f"keep must hold classes below {columns}, or -100 for none")
        # A row without a class of its own keeps the likeliest once more.
        kept = kept.scatter(-1, torch.where(keep == -100, order[..., :1], keep), True)
    return log_mask.masked_fill(kept, 0.0)


class DACKL(nn.Module):
    """`clipped_kl` with a window that a small network sets for each row, trained by the same loss.

    Its input are log p of the teacher's `features` likeliest classes, log q of the same classes and
    the entropy of p, all detached: 2 features + 1 -> hidden -> 2 numbers o, and l = sigmoid(o_1) /
    2, u = l + 1/2 + (1/2 - l) sigmoid(o_2). At first l is 0.01 and u 0.95, in every row. The call
    takes student and teacher logits [..., V], and `labels`, int64 [...], classes to keep (-100 =
    none); it returns [...]. Raises ValueError for features outside [1, V], and `clipped_kl`'s
    reasons.

    Defaults: ours, the paper gives no size.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import DACKL
        >>> dac = DACKL(features=3, hidden=8)
        >>> student, teacher = torch.zeros(2, 4), torch.tensor([[4.0, 2, 1, 0], [0, 0, 3, 1]])
        >>> dac(student, teacher).mean().backward()
        >>> lower, upper = dac.window(student, teacher)
        >>> round(lower[0].item(), 3), round(upper[0].item(), 3)
        (0.009, 0.951)
    """

    def __init__(
        self,
        features: int = 128,
        hidden: int = 256,
        *,
        coordinate: str = "mass",
        softness: float = 0.05,
        seed: int = 0,
    ):
        super().__init__()
        if features < 1 or hidden < 1:
            raise ValueError(f"features and hidden must be at least 1, got {features}, {hidden}")
        self.features, self.options = features, dict(coordinate=coordinate, softness=softness)
        generator, inputs = torch.Generator().manual_seed(seed), 2 * features + 1
        weight = torch.randn(hidden, inputs, generator=generator) * inputs**-0.5
        self.first, self.first_bias = nn.Parameter(weight), nn.Parameter(torch.zeros(hidden))
        # Zero: the bias alone is the window at first.
        self.second = nn.Parameter(torch.zeros(2, hidden))
        self.second_bias = nn.Parameter(torch.tensor([-4.0, 2.2]))

    def window(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper), float32 [...] each."""
        if self.features > teacher_logits.shape[-1]:
            raise ValueError(
                f"features={self.features} are more than the {teacher_logits.shape[-1]} classes"
            )
        with torch.no_grad():
            log_p, log_q = (x.float().log_softmax(-1) for x in (teacher_logits, student_logits))
            top, ids = log_p.topk(self.features, -1)
            entropy = torch.special.entr(log_p.exp()).sum(-1, keepdim=True)
            known = torch.cat([top, log_q.gather(-1, ids)], -1).clamp(min=SMALLEST)
            inputs = torch.cat([known, entropy], -1)
        inner = gelu(inputs @ self.first.T + self.first_bias)
        low, high = torch.sigmoid(inner @ self.second.T + self.second_bias).unbind(-1)
        lower = 0.5 * low
        return lower, 1 - (0.5 - lower) * (1 - high)  # never above 1 by rounding

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        window = self.window(student_logits, teacher_logits)
        return clipped_kl(student_logits, teacher_logits, *window, keep=labels, **self.options)
