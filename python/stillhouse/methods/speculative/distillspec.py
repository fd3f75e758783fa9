"""DistillSpec: the draft model of speculative decoding, distilled from its target.

How much speculative decoding saves depends on one number, the acceptance rate: how often the target
keeps a token that the draft model has proposed. It is one minus the total variation distance of
their distributions, so the draft model learns those, on text that it has written itself, and the
divergence is chosen for the task. Decoding stays exact. Where that is not asked for, lenience
accepts more tokens and trades the target's law for speed.

Equation, p the target, q the draft model, D a divergence, y ~ q(. | x) drawn without a gradient,
gamma tokens a draft:

    L = 1 / |y| sum_n D(p(. | x, y_<n) || q(. | x, y_<n))

    TVD++: grad L = -E_q[(r - m) / sigma grad log q] = grad TVD / sigma,
    r(x) = 1[q(x) < p(x)],   m = mean_n E_q[r],   sigma = sqrt(m (1 - m))

    alpha = E[sum_x min(p(x), q(x))] = 1 - E[TVD(p, q)]
    tokens a round = (1 - alpha^(gamma + 1)) / (1 - alpha)

Paper: DistillSpec: Improving Speculative Decoding via Knowledge Distillation, ICLR 2024,
arXiv 2310.08461. TVD++ is not in it, but in Direct Alignment of Draft Model, arXiv 2403.00858.

On the command line `stillhouse distill --method distillspec --on_policy 1` draws the responses from
the student (0.5: half of the batches), `--method_options kind=tvd` names the divergence, and
`--response_temperature` is that of the decoding that the draft model is for. On-policy training
from a poor draft model is slow with TVD and reverse KL: fine-tune it first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.methods.speculative.lenience import lenient_chain, lenient_law
from stillhouse.train import DivergenceObjective, LogitRows, row_loss, row_means

__all__ = [
    "DistillSpecLoss",
    "acceptance_rate",
    "block_efficiency",
    "lenient_chain",
    "lenient_law",
    "speed_up",
    "tvd_plus_plus",
]


def tvd_plus_plus(
    draft_logits: Tensor,
    target_logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The total variation distance, its gradient divided by the rewards' standard deviation.

    draft_logits, target_logits: [..., V], any float dtype each; the gradient goes to the draft
    model alone. mask: bool [...], True = this row counts; nothing unmasked gives 0. temperature
    divides both sides. Returns a float32 scalar (float64 for float64 logits). The reward of a token
    is 1 where the target finds it likelier than the draft model does, taken in exact expectation;
    m and sigma are the batch's. Where sigma is 0, all advantages are: TVD's value, no gradient.
    Raises ValueError for shapes or vocabularies that do not match.

    Defaults: temperature 1 (arXiv 2403.00858 trains with the plain distributions).

    Example:
        >>> import torch
        >>> from stillhouse.methods.speculative import tvd_plus_plus
        >>> draft = torch.tensor([[0.2, 0.3, 0.5]]).log().requires_grad_()
        >>> target = torch.tensor([[0.6, 0.3, 0.1]]).log()
        >>> round(tvd_plus_plus(draft, target).item(), 4)  # 0.4 / sqrt(0.2 * 0.8)
        1.0
    """
    options = {"mask": mask, "temperature": temperature}
    loss = ops.divergence_loss(draft_logits, target_logits, "tvd", **options)
    with torch.no_grad():
        _, stats = ops.divergence(draft_logits, target_logits, "tvd", return_stats=True, **options)
    below = stats.student_below if mask is None else stats.student_below[mask]
    return loss / _deviation(below)


def _deviation(below: Tensor) -> Tensor:
    """sigma of the batch's rewards, or 1 where all of them are alike."""
    m = below.sum() / max(below.numel(), 1)
    variance = m * (1 - m)
    return torch.where(variance > 0, variance, 1.0).sqrt()


class DistillSpecLoss(DivergenceObjective):
    """The divergence of the draft model from its target, as an objective.

    The responses it is taken on are the trainer's matter: `OnPolicy(share)` of `DistillTrainer`
    (`--on_policy`), or a `ResponseSource` with the draft model as student, the target as teacher,
    or stored text. kind: any divergence of `ops.KINDS` that needs no more than two rows of logits,
    or "tvd++"; options are its parameters. As in GKD, jsd with beta 0 is forward KL and with beta 1
    reverse KL. Returns `loss` and the means of acceptance, agreement and entropies; under tvd++
    also `tvd` and `sigma`.
    Raises ValueError for an unknown kind, one that needs no target, and parameters out of range;
    TypeError for parameters that a kind does not have.

    Defaults: kind reverse_kl (the paper chooses by task: forward and reverse KL, JSD, TVD),
    temperature 1 (the paper's loss, whatever it decodes at), label_weight 0.

    Example:
        >>> import torch
        >>> from stillhouse.methods.speculative import DistillSpecLoss
        >>> from stillhouse.train import LogitRows, supervised_rows
        >>> index = supervised_rows(torch.tensor([[5, 3, 1, 2]]))
        >>> draft = torch.zeros(3, 8, requires_grad=True)
        >>> rows = LogitRows(draft * 1, index), LogitRows(torch.eye(3, 8), index)
        >>> parts = DistillSpecLoss("jsd", beta=0.1)(*rows, {})
        >>> parts["loss"].backward()
        >>> round(parts["acceptance"].item(), 4)
        0.8453
    """

    def __init__(
        self,
        kind: Any = "reverse_kl",
        *,
        temperature: float = 1.0,
        label_weight: float = 0.0,
        **options: Any,
    ):
        self.standardized = kind == "tvd++"
        if self.standardized and label_weight:
            raise ValueError("tvd++ scales its gradient: it does not mix with a label_weight")
        kind = "tvd" if self.standardized else _gkd_kind(kind, options)
        kind = replace(ops.as_kind(kind), **options)
        if not kind.needs_teacher or kind.needs_labels:
            raise ValueError(
                f"expected a divergence of draft model and target, got {type(kind).__name__}"
            )
        super().__init__(kind, temperature=temperature, label_weight=label_weight)

    def __call__(
        self, student: LogitRows, teacher: Any, batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        if not self.standardized:
            return super().__call__(student, teacher, batch)
        tvd, stats = row_loss(student, teacher, self.kind, batch, temperature=self.temperature)
        sigma = _deviation(stats.student_below)
        parts = {"loss": tvd / sigma, "tvd": tvd.detach(), "sigma": sigma}
        return parts | row_means(stats)


def _gkd_kind(kind: Any, options: dict[str, Any]) -> Any:
    """What GKD's convention makes of JSD at its ends, whose parameter is spent then."""
    ends = {0: "forward_kl", 1: "reverse_kl"}
    if kind == "jsd" and options.get("beta") in ends:
        return ends[options.pop("beta")]
    return kind


def acceptance_rate(
    draft_logits: Tensor,
    target_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """The share of the draft model's tokens that exact speculative decoding keeps, mean of rows.

    draft_logits, target_logits: [..., V]; mask: bool [...], True = this row counts. temperature is
    that of the decoding: 0 is greedy, and the rate that at which both have the same likeliest
    token. A cut to top k or p belongs into the logits, of both sides, as -inf. Rounds begin behind
    the target's text, so measure on that. Returns a float32 scalar without a gradient.
    Raises ValueError for shapes that do not match, a negative temperature, and no row that counts.

    Defaults: temperature 1 (the paper's sampled tasks).

    Example:
        >>> import torch
        >>> from stillhouse.methods.speculative import acceptance_rate
        >>> draft, target = torch.tensor([[[0.2, 0.3, 0.5]], [[0.6, 0.3, 0.1]]]).log()
        >>> round(acceptance_rate(draft, target).item(), 4)
        0.6
        >>> acceptance_rate(draft, target, temperature=0).item()
        0.0
    """
    if not temperature >= 0:
        raise ValueError(f"expected a temperature >= 0, got {temperature}")
    options = {"mask": mask, "temperature": temperature or 1.0, "return_stats": True}
    with torch.no_grad():
        _, stats = ops.divergence(draft_logits, target_logits, "tvd", **options)
    found = stats.acceptance if temperature else stats.agreement
    found = found if mask is None else found[mask]
    if not found.numel():
        raise ValueError("no row counts: an acceptance rate needs at least one")
    return found.mean()


def block_efficiency(alpha: float | Tensor, gamma: int) -> float | Tensor:
    """Tokens that a round of gamma drafted tokens commits on average, each kept with alpha.

    alpha: a number or a tensor, in [0, 1]; the tokens' fates are taken as independent, which they
    are not quite. Between 1, where the draft model is of no use, and gamma + 1.
    Raises ValueError for alpha outside [0, 1] and gamma < 1.

    Defaults: none; the paper sweeps gamma from 3 to 7.

    Example:
        >>> from stillhouse.methods.speculative import block_efficiency
        >>> round(block_efficiency(0.8, gamma=5), 5), block_efficiency(1.0, gamma=5)
        (3.68928, 6.0)
    """
    if gamma < 1:
        raise ValueError(f"expected gamma, the drafted tokens of a round, >= 1, got {gamma}")
    inside = (alpha >= 0) & (alpha <= 1) if isinstance(alpha, Tensor) else 0 <= alpha <= 1
    if not (inside.all() if isinstance(inside, Tensor) else inside):
        raise ValueError(f"expected alpha, an acceptance rate, in [0, 1], got {alpha}")
    # The closed form's sum: it needs no limit at alpha = 1.
    return sum(alpha**i for i in range(1, gamma + 1)) + 1


def speed_up(alpha: float | Tensor, gamma: int, cost: float) -> float | Tensor:
    """How much faster than the target alone: tokens a round over the time of a round.

    cost: a forward of the draft model over one of the target, a time; verifying gamma + 1 tokens
    counts as one forward of the target. Below 1 speculative decoding is slower.
    Raises ValueError for a cost that is not finite and >= 0, and `block_efficiency`'s reasons.

    Defaults: none; cost is what your machine says.

    Example:
        >>> from stillhouse.methods.speculative import speed_up
        >>> round(speed_up(0.8, gamma=5, cost=0.1), 4)
        2.4595
    """
    if not 0 <= cost < float("inf"):
        raise ValueError(f"expected a cost, a ratio of times, >= 0, got {cost}")
    return block_efficiency(alpha, gamma) / (cost * gamma + 1)
