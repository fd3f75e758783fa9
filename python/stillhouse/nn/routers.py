"""Which expert gets which token: the routers of `nn.moe.MoE`.

A router is given to one `MoE`, which tells it the width and the number of experts. Its logits are
x W in float32 whatever the model computes in. A router that draws takes its numbers from its own
`seed`, that of its layer and the number of its calls so far, which is part of its state; the second
forward of gradient checkpointing would draw others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize, softplus

from stillhouse import ops


class Routed(NamedTuple):
    """What a router says of n tokens, k choices each, before any capacity."""

    logits: Tensor | None  # [n, E]
    probs: Tensor | None  # [n, E]
    index: Tensor  # int64 [n, k], the expert; -1 = no choice
    weight: Tensor  # [n, k]
    chance: Tensor | None = None  # [n, E], of being chosen under the router's noise


class Router(nn.Module):
    """`router(x [n, D], index) -> Routed`, once `build` was called."""

    sees_ahead = False  # whether a token's expert depends on later tokens
    renormalize = False  # whether the weights of a token's surviving choices are scaled to sum 1
    scale = 1.0  # of renormalised weights
    k: int | None = None

    def build(self, reference: Tensor, width: int, experts: int, seed: int) -> None:
        """Make the parameters for these sizes, N(0, 0.02^2), like `reference` in device and dtype.
        Raises ValueError for more choices than experts and for a router that is in use."""
        if getattr(self, "experts", None) is not None:
            raise ValueError("a router belongs to one MoE: copy it for another one")
        if self.k is not None and not 1 <= self.k <= experts:
            raise ValueError(f"expected 1 <= k <= {experts} experts, got k = {self.k}")
        self.experts = experts
        generator = torch.Generator().manual_seed(seed)
        weight = 0.02 * torch.randn(experts, width, generator=generator)
        self.weight = nn.Parameter(weight.to(reference))

    def logits(self, x: Tensor) -> Tensor:
        """x W, float32 (float64 for float64)."""
        found = _wide_linear(x, self.weight)
        if found.is_cpu and not torch.compiler.is_compiling() and bool(found.isnan().any()):
            raise ValueError("the router's logits are NaN: look at its inputs and its weights")
        return found


class _Drawing(Router):
    """A router that draws random numbers."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed, self.calls = seed, 0

    def build(self, reference: Tensor, width: int, experts: int, seed: int) -> None:
        super().build(reference, width, experts, seed)
        self.layer_seed = seed

    def generator(self, device: torch.device) -> torch.Generator:
        """One for this call."""
        self.calls += 1
        mixed = (self.seed * 1_000_003 + self.layer_seed) * 1_000_003 + self.calls
        return torch.Generator(device).manual_seed(mixed % 2**63)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.calls)

    def set_extra_state(self, state: Tensor) -> None:
        self.calls = int(state)


class TopK(_Drawing):
    """The k experts of the largest scores (Shazeer et al. 2017, arXiv 1701.06538; GShard, arXiv
    2006.16668).

    Scores are softmax(logits), and so are weights; `renormalize` scales those of the chosen to sum
    1, which is the softmax over the chosen. noise, while training: a number is the standard
    deviation of a normal one on all logits (V-MoE: 1 / E); "learned" makes it softplus(x W_n) +
    0.01 with W_n from 0 (Shazeer); "gumbel" helps to choose all experts but the first, and leaves
    weights alone (the second expert of DeepSpeed).
    sigmoid: scores are sigmoid(logits), each for itself, and the weights are `scale` times the
    renormalised ones; bias_speed: a bias on the scores, for choosing alone, that `update_bias`
    moves towards equal loads (DeepSeek-V3, arXiv 2412.19437).

    Raises ValueError for k < 1, another noise, a scale without renormalising.

    Defaults: k 2, renormalised, no noise (Mixtral).
    """

    def __init__(
        self,
        k: int = 2,
        renormalize: bool = True,
        noise: float | str = 0.0,
        *,
        sigmoid: bool = False,
        scale: float = 1.0,
        bias_speed: float = 0.0,
        seed: int = 0,
    ):
        super().__init__(seed)
        known = noise in ("learned", "gumbel") if isinstance(noise, str) else 0 <= noise < math.inf
        if not known:
            raise ValueError(f"noise must be a number, 'learned' or 'gumbel', got {noise!r}")
        if k < 1:
            raise ValueError(f"expected k >= 1, got {k}")
        if scale != 1 and not renormalize:
            raise ValueError("scale is that of renormalised weights: it needs renormalize=True")
        self.k, self.renormalize, self.noise, self.scale = k, renormalize, noise, scale
        self.sigmoid, self.bias_speed = sigmoid, bias_speed

    def build(self, reference: Tensor, width: int, experts: int, seed: int) -> None:
        super().build(reference, width, experts, seed)
        if self.noise == "learned":
            self.noise_weight = nn.Parameter(torch.zeros(experts, width).to(reference))
        if self.bias_speed:
            self.register_buffer("bias", torch.zeros(experts, device=reference.device))

    def forward(self, x: Tensor, index: Tensor | None = None) -> Routed:
        logits, deviation = self.logits(x), None
        used = logits
        draws = self.noise != 0 and self.training
        if draws and self.noise != "gumbel":
            if self.noise == "learned":
                deviation = softplus(_wide_linear(x, self.noise_weight)) + 1e-2
            else:
                deviation = torch.full_like(logits, self.noise)
            used = logits + deviation * torch.empty_like(logits).normal_(
                generator=self.generator(x.device)
            )
        scores = used.sigmoid() if self.sigmoid else used.softmax(-1)
        chosen = self._choose(scores.detach(), used.detach(), draws)
        weight = scores.gather(-1, chosen)
        chance = None
        if deviation is not None:
            chance = _chance(logits, used, deviation, chosen)
        return Routed(logits, scores, chosen, weight, chance)

    def _choose(self, scores: Tensor, used: Tensor, draws: bool) -> Tensor:
        by = scores + self.bias.to(scores) if self.bias_speed else scores
        if not (draws and self.noise == "gumbel") or self.k == 1:
            return by.topk(self.k, -1).indices
        first = by.argmax(-1, keepdim=True)
        # -log of an exponential draw is a Gumbel one.
        draw = torch.empty_like(used).exponential_(generator=self.generator(used.device))
        others = (used - draw.log()).scatter(-1, first, -math.inf)
        return torch.cat([first, others.topk(self.k - 1, -1).indices], -1)

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """Raise the bias of experts below the mean load and lower that of those above it, by
        `bias_speed`. load: [E], `RouterInfo.load` of a step. Raises ValueError without a bias."""
        if not self.bias_speed:
            raise ValueError("this router has no bias: give it a bias_speed")
        load = load.to(self.bias)
        self.bias += self.bias_speed * (load.mean() - load).sign()


class Switch(TopK):
    """One expert, whose weight is its probability (Switch, arXiv 2101.03961): what keeps a gradient
    to the router. jitter: while training its inputs are multiplied by U(1 - jitter, 1 + jitter).

    Raises ValueError for a jitter outside [0, 1).

    Defaults: no jitter (the public code; the paper has 0.01).
    """

    def __init__(self, jitter: float = 0.0, *, seed: int = 0):
        super().__init__(1, renormalize=False, seed=seed)
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must be in [0, 1), got {jitter}")
        self.jitter = jitter

    def logits(self, x: Tensor) -> Tensor:
        if self.jitter and self.training:
            low, high = 1 - self.jitter, 1 + self.jitter
            x = x * torch.empty_like(x).uniform_(low, high, generator=self.generator(x.device))
        return super().logits(x)


class ExpertChoice(Router):
    """Every expert takes its c n / E tokens of the largest softmax(logits) over experts, which is
    their weight (arXiv 2202.09368). Loads are equal; a token may have none to E experts. What a
    token gets depends on later ones: not for models that generate.

    Raises ValueError for c <= 0.

    Defaults: c 2, the mean number of experts of a token (the paper).
    """

    sees_ahead = True

    def __init__(self, c: float = 2.0):
        super().__init__()
        if c <= 0:
            raise ValueError(f"c, the mean number of experts of a token, must be positive, got {c}")
        self.c = c

    def forward(self, x: Tensor, index: Tensor | None = None) -> Routed:
        logits = self.logits(x)
        probs = logits.softmax(-1)
        each = min(len(x), math.ceil(self.c * len(x) / self.experts))
        taken = torch.zeros_like(probs, dtype=torch.bool)
        taken.scatter_(0, probs.detach().topk(each, 0).indices, True)
        weight, chosen = torch.where(taken, probs, -1).topk(self.experts, -1)
        none = weight < 0
        return Routed(logits, probs, chosen.masked_fill(none, -1), weight.masked_fill(none, 0))


class Hash(Router):
    """A fixed expert for every token id (Hash Layers, arXiv 2106.04426): `index` of the call are
    the ids. table: int64 [V]. Raises ValueError for experts that do not exist and ids beyond it.
    """

    def __init__(self, table: Tensor):
        super().__init__()
        if table.dim() != 1 or table.is_floating_point() or table.numel() == 0:
            raise ValueError(f"expected a table int64 [V], got {table.dtype} {tuple(table.shape)}")
        self.register_buffer("table", table.to(torch.int64))

    def build(self, reference: Tensor, width: int, experts: int, seed: int) -> None:
        super().build(reference, width, experts, seed)
        self.weight = None
        self.table = self.table.to(reference.device)
        low, high = int(self.table.min()), int(self.table.max())
        if low < 0 or high >= experts:
            raise ValueError(f"the table's experts must be 0 to {experts - 1}, got {low} to {high}")

    def forward(self, x: Tensor, index: Tensor | None = None) -> Routed:
        if index is None or index.dim() != 1:
            raise ValueError("Hash routes by token ids: pass index=, one id a token")
        if (
            index.is_cpu
            and index.numel()
            and not 0 <= int(index.min()) <= int(index.max()) < len(self.table)
        ):
            raise ValueError(f"the table is for {len(self.table)} ids, got {int(index.max())}")
        chosen = self.table[index][:, None]
        return Routed(None, None, chosen, torch.ones_like(chosen, dtype=x.dtype))


class Random(_Drawing):
    """k experts drawn for every token, weight 1 / k each (THOR, arXiv 2110.04260, has 2)."""

    def __init__(self, k: int = 2, *, seed: int = 0):
        super().__init__(seed)
        self.k = k

    def build(self, reference: Tensor, width: int, experts: int, seed: int) -> None:
        super().build(reference, width, experts, seed)
        self.weight = None

    def forward(self, x: Tensor, index: Tensor | None = None) -> Routed:
        generator = self.generator(x.device)
        keys = torch.rand(len(x), self.experts, generator=generator, device=x.device)
        chosen = keys.topk(self.k, -1).indices
        return Routed(None, None, chosen, torch.full_like(chosen, 1 / self.k, dtype=x.dtype))


class SinkhornRouter(Router):
    """Entropic transport of tokens onto experts of equal capacity; a token goes where its plan is
    largest (Clark et al., arXiv 2202.01169). No gradient flows through the plan: the weight is the
    softmax of the logits, or with `sigmoid` that of the one logit. Outside of training the largest
    logit decides, so that a token does not depend on the others.

    Raises ValueError for numbers out of range.

    Defaults: epsilon 0.5, 8 iterations, one expert (ours; the paper has one expert, too).
    """

    def __init__(
        self, k: int = 1, epsilon: float = 0.5, iterations: int = 8, *, sigmoid: bool = False
    ):
        super().__init__()
        if k < 1 or epsilon <= 0 or iterations < 1:
            raise ValueError(
                f"expected k >= 1, epsilon > 0, iterations >= 1, got {k}, {epsilon}, {iterations}"
            )
        self.k, self.epsilon, self.iterations, self.sigmoid = k, epsilon, iterations, sigmoid

    def plan(self, logits: Tensor) -> Tensor:
        """The plan [n, E]: rows sum to about 1, columns to n / E."""
        n, experts = logits.shape
        with torch.no_grad():
            cost = logits.max() - logits
            rows, columns = cost.new_ones(n), cost.new_full((experts,), n / experts)
            found = ops.sinkhorn(
                cost[None], self.epsilon, iterations=self.iterations, a=rows, b=columns
            )
        return found.plan[0]

    def forward(self, x: Tensor, index: Tensor | None = None) -> Routed:
        logits = self.logits(x)
        by = self.plan(logits) if self.training and len(x) else logits.detach()
        chosen = by.topk(self.k, -1).indices
        probs = logits.softmax(-1)
        weight = (logits.sigmoid() if self.sigmoid else probs).gather(-1, chosen)
        return Routed(logits, probs, chosen, weight)


class Soft(Router):
    """No choice at all: every expert gets `slots` mixtures of a sequence's tokens, and every token
    a mixture of what comes out (Soft MoE, arXiv 2308.00951).

    Logits are g (x / |x|) (Phi / |Phi|), with g from 1; the mixtures are their softmax over tokens
    and over slots. Every token sees all others: not for models that generate.

    Raises ValueError for slots < 1.

    Defaults: 1 slot an expert (the paper's best).
    """

    sees_ahead = True

    def __init__(self, slots: int = 1):
        super().__init__()
        if slots < 1:
            raise ValueError(f"expected slots >= 1, got {slots}")
        self.slots = slots

    def build(self, reference: Tensor, width: int, experts: int, seed: int) -> None:
        super().build(reference, width, experts * self.slots, seed)
        self.experts = experts
        self.gain = nn.Parameter(torch.ones(()).to(reference))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of x [G, T, D] and mask [G, T]: logits [G, T, S], and the weights that make slots of
        tokens and tokens of slots, of the same shape."""
        # Directions only: a token's size does not count.
        logits = self.gain * _wide_linear(normalize(x, dim=-1), normalize(self.weight, dim=-1))
        there = mask[..., None]
        dispatch = logits.masked_fill(~there, -math.inf).softmax(1)
        dispatch = dispatch.masked_fill(~there, 0)  # of nothing but padding it would be NaN
        return logits, dispatch, logits.softmax(-1)


def _wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(wide), weight.to(wide))


def _chance(logits: Tensor, used: Tensor, deviation: Tensor, chosen: Tensor) -> Tensor:
    """P that an expert is among the k, were its own noise drawn again."""
    experts, k = logits.shape[-1], chosen.shape[-1]
    if k == experts:
        return torch.ones_like(logits)
    values = used.topk(k + 1, -1).values
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
    threshold = torch.where(inside, values[..., k, None], values[..., k - 1, None])
    return torch.special.ndtr((logits - threshold) / deviation)
