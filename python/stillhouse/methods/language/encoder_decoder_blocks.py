"""Blocks of a pre-norm transformer with grouped queries and rotary positions, and their cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [..., T, size / 2]


def rotation(positions: Tensor, size: int, theta: float, ntk: float = 1.0) -> Rotation:
    """Angles of RoPE for positions [..., T], in float32. ntk > 1 stretches the base by
    ntk^(size / (size - 2)), so that the slowest wave is `ntk` times as long."""
    base = theta if ntk == 1 else theta * ntk ** (size / (size - 2))
    even = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
    angle = positions[..., None] * base ** (-even / size)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, angles: Rotation) -> Tensor:
    """Keys or queries [B, heads, T, size]; feature i is paired with feature i + size / 2."""
    a, b = x.chunk(2, -1)
    cos, sin = (each.to(x.dtype) for each in angles)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class KeyValues:
    """Keys and values of one layer [B, kv heads, room, size], of which the first `length` count."""

    def __init__(self, room: int):
        self.room, self.length = room, 0
        self.kept: tuple[Tensor, ...] = ()

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """What is kept with these [B, kv heads, t, size] behind it. Raises ValueError where there
        is no room."""
        start, end = self.length, self.length + new[0].shape[2]
        if end > self.room:
            raise ValueError(f"a cache of {self.room} tokens was given {end}")
        if not self.kept:
            self.kept = tuple(x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in new)
        for kept, x in zip(self.kept, new, strict=True):
            kept[:, :, start:end] = x
        self.length = end
        return tuple(kept[:, :, :end] for kept in self.kept)

    @property
    def bytes_per_token(self) -> int:
        """What one more token of one sequence takes."""
        return sum(x.element_size() * x.shape[1] * x.shape[3] for x in self.kept)


class Attention(nn.Module):
    """Grouped-query attention. Query head i reads key head i mod kv_heads (the released blocks are
    repeated as a whole); interleaved: i // (heads / kv_heads)."""

    def __init__(self, config: Any):
        super().__init__()
        self.size, self.interleaved = config.head_size, config.interleaved
        self.groups = config.heads // config.kv_heads
        inner, shared = config.heads * self.size, config.kv_heads * self.size
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, shared, bias=False)
        self.v = nn.Linear(config.width, shared, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)

    def keys_values(self, x: Tensor, angles: Rotation | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, kv heads, T, size] of what is read, x [B, T, width]."""
        k, v = self._heads(self.k(x)), self._heads(self.v(x))
        return (k if angles is None else rotate(k, angles)), v

    def forward(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, ...],
        angles: Rotation | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """[B, t, width] of x [B, t, width]. mask: bool, broadcast to [B, heads, t, T], True = is
        read. causal: the t queries are the last of T tokens, and read nothing behind them."""
        q = self._heads(self.q(x))
        q = q if angles is None else rotate(q, angles)
        k, v = (self._expand(each) for each in keys_values)
        t, read = q.shape[2], k.shape[2]
        if causal and t != read:
            mask = torch.ones(t, read, dtype=torch.bool, device=x.device).tril(read - t)
        mixed = scaled_dot_product_attention(q, k, v, mask, is_causal=causal and t == read)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)

    def _expand(self, x: Tensor) -> Tensor:
        if self.interleaved:
            return x.repeat_interleave(self.groups, 1)
        return x.repeat(1, self.groups, 1, 1)


class Block(nn.Module):
    """Self-attention, where it `crosses` attention to a memory, and an MLP, each behind a norm."""

    def __init__(self, config: Any, *, causal: bool, crosses: bool = False):
        super().__init__()

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(config.width, eps=1e-6)

        self.causal = causal
        self.norm, self.attention = norm(), Attention(config)
        self.cross_norm, self.cross = (norm(), Attention(config)) if crosses else (None, None)
        self.ffn_norm = norm()
        self.up = nn.Linear(config.width, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        angles: Rotation,
        mask: Tensor | None = None,
        past: KeyValues | None = None,
        memory: tuple[Tensor, ...] | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """[B, t, width]. past: what came before, which x is added to. memory: keys and values that
        `cross` has made."""
        h = self.norm(x)
        own = self.attention.keys_values(h, angles)
        own = own if past is None else past.append(*own)
        x = x + self.dropout(self.attention(h, own, angles, mask, self.causal))
        if self.cross is not None:
            h = self.cross_norm(x)
            x = x + self.dropout(self.cross(h, memory, mask=memory_mask))
        h = gelu(self.up(self.ffn_norm(x)), approximate="tanh")
        return x + self.dropout(self.down(h))


def initialize_(model: nn.Module) -> None:
    """Normal weights: variance 1 / fan-in, and 1 / width of embeddings, which heads are tied to."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
