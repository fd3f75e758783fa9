"""Mixtures of experts: a layer on a list of experts and a router, the losses that keep its loads
even, and dense models made into mixtures."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stillhouse.nn.anatomy import blocks
from stillhouse.nn.routers import (
    ExpertChoice,
    Hash,
    Random,
    Routed,
    Router,
    SinkhornRouter,
    Soft,
    Switch,
    TopK,
)
from stillhouse.nn.surgery import Replaced, replace_modules_

__all__ = [
    "ExpertChoice",
    "Hash",
    "MoE",
    "Random",
    "Router",
    "RouterInfo",
    "SinkhornRouter",
    "Soft",
    "Switch",
    "TopK",
    "router_balance",
    "router_z",
    "upcycle_",
]


class RouterInfo(NamedTuple):
    """How the last call of a `MoE` was routed: its N tokens that count, k choices each.

    logits and probs of Hash, Random and given experts are None, index and weight of Soft (whose
    logits are [N, slots], and whose probs are a token's weights on each expert's slots together).
    """

    logits: Tensor | None  # float32 [N, E]
    probs: Tensor | None  # [N, E]
    index: Tensor | None  # int64 [N, k], before capacity; -1 = no choice
    weight: Tensor | None  # [N, k], 0 of choices that were dropped
    load: Tensor  # int64 [E], choices before capacity
    dropped: Tensor  # int64 [], choices beyond the capacity
    chance: Tensor | None = None  # [N, E], of being chosen under a router's normal noise


class MoE(nn.Module):
    """y = sum_e w_e(x) f_e(x) over the experts that a router chooses, and the shared ones.

    Args:
        experts: modules [n, D] -> [n, D], all with parameters of the same shapes.
        router: one of `TopK`, `Switch`, `ExpertChoice`, `SinkhornRouter`, `Hash`, `Soft`, `Random`;
            None where every call says the experts itself. It belongs to this layer.
        shared: so many of the experts, the first ones, get every token with weight 1 (DeepSeekMoE).
        capacity: a factor c; an expert takes at most ceil(c N k / E) tokens, first choices before
            second ones and earlier tokens before later ones. Those beyond it are dropped, weights
            that the router renormalises are so over what is left. None drops nothing.
        width: D, where the first linear layer of an expert does not say it.
        seed: of the router's parameters.

    `moe(x, mask=None, index=None)` takes x [..., D] and mask bool [...]: rows that do not count are
    not routed, and 0 in the result. index: int64 [...] or [..., k], the experts (router None,
    weight 1 each; -1 = none) or the token ids (`Hash`). `Soft` mixes along the axis before the
    last. `info` is the `RouterInfo` of the last call, with its graph.

    Raises ValueError for no experts, experts of unequal shapes, k > E, a capacity <= 0 and one
    for a router that has none, an index that is missing or has no use, and logits that are NaN
    (where looking at them does not make an accelerator wait).

    Defaults: no capacity, so that what a token gets does not depend on its batch.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillhouse.nn.moe import MoE, TopK, router_balance
        >>> moe = MoE([nn.Linear(4, 4) for _ in range(3)], TopK(2))
        >>> moe(torch.ones(5, 4)).shape, moe.info.load.sum()
        (torch.Size([5, 4]), tensor(10))
        >>> router_balance(moe.info, "switch").backward()
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        router: Router | None,
        shared: int = 0,
        capacity: float | None = None,
        *,
        width: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        experts = list(experts)
        if not 0 <= shared < max(len(experts), 1):
            raise ValueError(f"expected 0 <= shared < {len(experts)} experts, got {shared}")
        self.shared, self.experts = nn.ModuleList(experts[:shared]), nn.ModuleList(experts[shared:])
        if not self.experts:
            raise ValueError("a mixture needs at least one expert")
        shapes = [[each.shape for each in expert.parameters()] for expert in self.experts]
        if any(each != shapes[0] for each in shapes):
            raise ValueError("experts must have parameters of the same shapes")
        if capacity is not None and not 0 < capacity < math.inf:
            raise ValueError(f"capacity is a positive factor, got {capacity}")
        if capacity is not None and isinstance(router, (ExpertChoice, Soft)):
            raise ValueError(f"{type(router).__name__} has no capacity: its loads are equal")
        self.capacity = capacity
        self.router = router
        if self.router is not None:
            reference = next(self.experts[0].parameters(), torch.empty(0))
            width = _width(self.experts[0]) if width is None else width
            self.router.build(reference, width, len(self.experts), seed)
        self.info: RouterInfo | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The graph of the last call can be neither copied nor pickled.
        return self.__dict__ | {"info": None}

    def forward(self, x: Tensor, mask: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
            raise ValueError(
                f"mask must be bool {tuple(x.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}"
            )
        if index is not None and not (self.router is None or isinstance(self.router, Hash)):
            raise ValueError(f"{type(self.router).__name__} chooses itself: index has no use")
        if isinstance(self.router, Soft):
            return self._mixed(x, mask)
        rows = x.reshape(-1, x.shape[-1])
        if index is not None:
            index = index.reshape(len(rows), *index.shape[x.dim() - 1 :])
        if mask is not None:
            there = mask.reshape(-1)
            rows, index = rows[there], None if index is None else index[there]
        y = self._routed(rows, index)
        for expert in self.shared:
            y = y + expert(rows)
        if mask is not None:
            y = y.new_zeros(there.numel(), y.shape[-1]).index_put((there.nonzero()[:, 0],), y)
        return y.view(x.shape)

    def _routed(self, rows: Tensor, index: Tensor | None) -> Tensor:
        n, experts = len(rows), len(self.experts)
        routed = _given(index, rows, experts) if self.router is None else self.router(rows, index)
        chosen, weight = routed.index, routed.weight
        load = chosen[chosen >= 0].bincount(minlength=experts)
        dropped = load.new_zeros(())
        if self.capacity is not None:
            most = math.ceil(self.capacity * n * chosen.shape[1] / experts)
            fits = _fits(chosen, experts, most)
            weight, dropped = weight * fits, (~fits & (chosen >= 0)).sum()
            chosen = chosen.masked_fill(~fits, -1)
        if self.router is not None and self.router.renormalize:
            total = weight.sum(-1, keepdim=True)
            weight = self.router.scale * weight / torch.where(total > 0, total, 1)
        self.info = RouterInfo(
            routed.logits, routed.probs, routed.index, weight, load, dropped, routed.chance
        )

        # Choices sorted by expert; those of none come first and are left out.
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = flat[flat >= 0].bincount(minlength=experts).tolist()
        parts = order[len(flat) - sum(counts) :].split(counts)
        y = torch.zeros_like(rows)
        for expert, part in zip(self.experts, parts, strict=True):
            if len(part):
                token = part // chosen.shape[1]
                out = expert(rows[token]).to(y.dtype)
                y = y.index_add(0, token, out * weight.flatten()[part, None].to(y.dtype))
        return y

    def _mixed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        grouped = x.reshape(-1, *x.shape[-2:])  # [G, T, D]
        there = torch.ones_like(grouped[..., 0], dtype=torch.bool)
        if mask is not None:
            there = mask.reshape(there.shape)
            grouped = grouped.masked_fill(~there[..., None], 0)  # 0 times NaN would be NaN
        logits, dispatch, combine = self.router(grouped, there)
        slots = (dispatch.mT.to(x.dtype) @ grouped).unflatten(1, (len(self.experts), -1))
        out = [expert(slots[:, i]) for i, expert in enumerate(self.experts)]
        y = combine.to(x.dtype) @ torch.cat(out, 1).to(x.dtype)
        for expert in self.shared:
            y = y + expert(grouped)
        probs = combine[there].unflatten(-1, (len(self.experts), -1)).sum(-1)
        load = torch.full_like(probs[:0].sum(0), len(grouped) * self.router.slots).long()
        self.info = RouterInfo(logits[there], probs, None, None, load, load.new_zeros(()))
        return y.masked_fill(~there[..., None], 0).view(x.shape)


def router_balance(info: RouterInfo, kind: str) -> Tensor:
    """How unevenly a router loads its experts: a scalar, without a weight. With n tokens, c_e the
    choices of expert e and P_e its mean probability:

    - "gshard": E sum_e (c_e / n) P_e of first choices alone; 1 when even, E when one gets all
      (arXiv 2006.16668 as coded; the paper prints E^-2 of it);
    - "switch": the same of all k choices; k when even (arXiv 2101.03961);
    - "deepseek": the same over k; 1 when even (arXiv 2401.06066);
    - "importance": the squared coefficient of variation of the experts' summed weights; 0 when even
      (arXiv 1701.06538);
    - "load": that of the summed chances to be chosen; it needs a router with normal noise.

    No gradient flows through counts. Variances are those of a population. Weights do not transfer
    from one kind to another. Raises ValueError for another kind and where a router has not what it
    takes.

    Defaults: none; the published weights are 0.01 (gshard, switch, deepseek), 0.1 (the others).
    """
    kinds = ("gshard", "switch", "deepseek", "importance", "load")
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}, got {kind!r}")
    if kind == "load":
        if info.chance is None:
            raise ValueError("'load' needs a router with normal noise, in training")
        return _variation(info.chance.sum(0))
    if info.index is None or info.probs is None:
        raise ValueError(f"{kind!r} needs choices and probabilities, which this router has not")
    n, experts = max(len(info.probs), 1), info.load.numel()
    if kind == "importance":
        weight = torch.zeros_like(info.probs)
        weight = weight.scatter_add(1, info.index.clamp(min=0), info.weight.to(weight.dtype))
        return _variation(weight.sum(0))
    count = info.load
    if kind == "gshard":
        first = info.index[:, 0]
        count = first[first >= 0].bincount(minlength=experts)
    share = count.to(info.probs.dtype) / n
    if kind == "deepseek":
        share = share / info.index.shape[1]
    return experts * (share * info.probs.sum(0) / n).sum()


def router_z(info: RouterInfo) -> Tensor:
    """mean_t logsumexp(logits_t)^2, which keeps logits small (ST-MoE, arXiv 2202.08906): a scalar,
    without its weight of 1e-3. Raises ValueError for a router without logits."""
    if info.logits is None:
        raise ValueError("this router has no logits")
    return info.logits.logsumexp(-1).square().sum() / max(len(info.logits), 1)


def upcycle_(
    model: nn.Module,
    router: Router,
    *,
    layers: str | Iterable[int] = "alternate",
    experts: int = 4,
    match: str | Iterable[str] = "mlp",
    capacity: float | None = None,
    noise: float = 0.0,
    sees_ahead: bool = False,
    seed: int = 0,
) -> list[Replaced]:
    """Make mixtures of feed-forward layers, in place: `experts` copies of each, and a router
    (arXiv 2212.05055). With renormalised weights and no capacity the model computes what it did.

    layers: "alternate" (blocks 0, 2, 4, ...), "first_half", "second_half", "all" or 0-based
    numbers. match: patterns of paths within a block. Each mixture has its own copy of `router`.
    noise: N(0, 1) times this share of a matrix' standard deviation, on every copy. sees_ahead
    allows a router for which that is true in a model that generates. The configuration knows
    nothing of it: keep the weights by `state_dict`.
    Returns a row a mixture. Raises ValueError for blocks that do not exist, another word, experts
    < 1, a block without a match, and a router that sees ahead.

    Defaults: 4 experts, every other block, router weights N(0, 0.02^2) (LLaVA-MoD, arXiv
    2408.15881).

    Example:
        >>> from stillhouse.nn.moe import TopK, upcycle_
        >>> from stillhouse.nn.surgery import train_only
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=32)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes))
        >>> [row.path for row in upcycle_(model, TopK(2))]
        ['model.layers.0.mlp', 'model.layers.2.mlp']
        >>> train_only(model, ["*.experts.*", "*.router.*"])
        3136
    """
    path, stack = blocks(model)
    depth = len(stack)
    halves = {
        "alternate": range(0, depth, 2),
        "first_half": range(depth // 2),
        "second_half": range(depth // 2, depth),
        "all": range(depth),
    }
    if isinstance(layers, str) and layers not in halves:
        raise ValueError(f"layers must be {', '.join(halves)} or numbers, got {layers!r}")
    chosen = list(halves[layers] if isinstance(layers, str) else layers)
    for number in chosen:
        if not 0 <= number < depth:
            raise ValueError(f"layer {number} does not exist: the model has {depth} blocks")
    if experts < 1:
        raise ValueError(f"expected at least one expert, got {experts}")
    if router.sees_ahead and not sees_ahead and _generates(model):
        raise ValueError(
            f"{type(router).__name__} looks at later tokens, which a model that generates has not: "
            "sees_ahead=True allows it"
        )
    report = []
    for number in chosen:

        def make(name: str, module: nn.Module, number: int = number) -> MoE:
            copies = [copy.deepcopy(module) for _ in range(experts)]
            _disturb(copies, noise, seed * 1_000_003 + number)
            own = copy.deepcopy(router)
            return MoE(copies, own, capacity=capacity, seed=seed * 1_000_003 + number)

        for row in replace_modules_(stack[number], match, make):
            report.append(row._replace(path=f"{path}.{number}.{row.path}"))
    return report


def _generates(model: nn.Module) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)())


@torch.no_grad()
def _disturb(copies: list[nn.Module], noise: float, seed: int) -> None:
    if not noise:
        return
    generator = torch.Generator().manual_seed(seed)
    for module in copies:
        for parameter in module.parameters():
            if parameter.dim() > 1:
                draw = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter += noise * parameter.std() * draw


def _width(expert: nn.Module) -> int:
    for module in expert.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
    raise ValueError(f"{type(expert).__name__} does not say how wide its inputs are: pass width=")


def _given(index: Tensor | None, rows: Tensor, experts: int) -> Routed:
    if index is None:
        raise ValueError("without a router every call needs index=, the expert of each token")
    index = index if index.dim() == 2 else index[:, None]
    if index.is_cpu and index.numel() and not -1 <= int(index.min()) <= int(index.max()) < experts:
        raise ValueError(
            f"experts are 0 to {experts - 1} (-1 = none), got {int(index.min())} to "
            f"{int(index.max())}"
        )
    return Routed(None, None, index, (index >= 0).to(rows.dtype))


def _fits(chosen: Tensor, experts: int, most: int) -> Tensor:
    """Whether a choice is among the first `most` of its expert: [n, k]."""
    queue = chosen.T.flatten()  # first choices before second ones
    taken = queue[:, None] == torch.arange(experts, device=queue.device)
    place = (taken.cumsum(0) * taken).sum(-1)
    return ((place > 0) & (place <= most)).view(chosen.T.shape).T


def _variation(x: Tensor) -> Tensor:
    return x.var(correction=0) / (x.mean().square() + 1e-10)
