"""Keys and values that a model has cached, as tensors to optimise, with Adam's moments."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

EPSILON = 1e-8  # Adam's


@dataclass(frozen=True, eq=False)
class CachedStates:
    """What a model has cached of n tokens. `states` [2L, B, heads, n, width], layer l's keys at 2l
    and its values at 2l + 1, float32 even where the weights are half; Adam's moments `first` and
    `second` of the same shape, and int64 [n] `updates`, the steps that each state has taken; int64
    [B] `last`, the token that comes next and was not read yet; `offset`, the first state's place in
    the text."""

    states: Tensor
    first: Tensor
    second: Tensor
    updates: Tensor
    last: Tensor
    offset: int = 0

    def __len__(self) -> int:
        return self.states.shape[-2]

    @classmethod
    def of(cls, states: Tensor, last: Tensor) -> CachedStates:
        """New ones: moments and steps are 0."""
        updates = states.new_zeros(states.shape[-2], dtype=torch.int64)
        return cls(states, torch.zeros_like(states), torch.zeros_like(states), updates, last)

    def step(
        self, gradient: Tensor, *, lr: float, betas: tuple[float, float], clip: float
    ) -> CachedStates:
        """After a step of Adam on them all, each row's gradient clipped to the norm `clip`; the
        bias of a state's moments is corrected by its own number of steps."""
        norm = gradient.square().sum((0, 2, 3, 4), keepdim=True).sqrt()
        gradient = gradient * (clip / norm).clamp(max=1)
        updates = self.updates + 1
        first = betas[0] * self.first + (1 - betas[0]) * gradient
        second = betas[1] * self.second + (1 - betas[1]) * gradient.square()
        scale = [1 - beta ** updates.to(gradient.dtype)[:, None] for beta in betas]
        change = (first / scale[0]) / ((second / scale[1]).sqrt() + EPSILON)
        states = self.states - lr * change
        return CachedStates(states, first, second, updates, self.last, self.offset)

    def append(self, other: CachedStates) -> CachedStates:
        """These, and those of the tokens that come next."""
        tensors = [
            torch.cat(pair, -2) for pair in zip(self._tensors(), other._tensors(), strict=True)
        ]
        updates = torch.cat([self.updates, other.updates])
        return CachedStates(*tensors, updates, other.last, self.offset)

    def newest(self, count: int | None) -> CachedStates:
        """The last `count` of them, with their moments; None: all."""
        gone = 0 if count is None else max(0, len(self) - count)
        tensors = [each[..., gone:, :] for each in self._tensors()]
        return CachedStates(*tensors, self.updates[gone:], self.last, self.offset + gone)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.states, self.first, self.second


def read(
    lm: nn.Module, states: Tensor | None, inputs: Tensor, place: int, *, again: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits [B, k, V] of inputs [B, k] at `place` behind cached states, and the keys and values of
    the inputs [2L, B, heads, k, width]. again: the states are those of the inputs themselves, and
    each input reads those before it, and its own.

    Raises ValueError for a model that caches anything but keys and values of one shape.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=lm.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise ValueError(f"{type(lm).__name__} caches more than the keys and values of all tokens")
    dtype, count = next(lm.parameters()).dtype, inputs.shape[1]
    if states is not None:
        for layer, (keys, values) in enumerate(states.to(dtype).unflatten(0, (-1, 2))):
            cache.update(keys, values, layer)
    options: dict[str, Any] = {}
    if again:
        own = torch.eye(count, dtype=torch.bool, device=inputs.device)
        hidden = torch.cat([torch.ones_like(own).triu(), ~own], 1)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=inputs.device)
        mask = mask.masked_fill(hidden, torch.finfo(dtype).min)
        options["attention_mask"] = mask.expand(len(inputs), 1, -1, -1)
    # transformers has renamed it.
    named = "cache" if "cache" in inspect.signature(lm.forward).parameters else "past_key_values"
    options[named] = cache
    places = torch.arange(place, place + count, device=inputs.device)[None]
    logits = lm(input_ids=inputs, position_ids=places, use_cache=True, **options).logits
    cached = [each for layer in cache.layers for each in (layer.keys, layer.values)]
    if len({each.shape for each in cached}) != 1:
        raise ValueError(f"{type(lm).__name__} caches states of several shapes")
    fresh = torch.stack([each[..., -count:, :] for each in cached])
    return logits, fresh.to(torch.promote_types(dtype, torch.float32))
