"""Keys and values of what a model has read, in memory that stays: trees are written behind it and
accepted paths moved into place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from stillhouse.ops import kv_gather_indices


class TreeCache(Cache):
    """A `transformers` cache of B sequences of their own lengths, with room for a tree behind each.

    Sequence b fills places 0 to lengths[b] - 1; the trees of all start at `width`, the largest
    length, so that a forward writes one slice. What lies between must be masked. `accept` moves
    the keys and values of a path behind the sequence's own.

    read: a `DynamicCache` after a forward over prompts that were padded on the right; lengths: how
    many tokens of each count. room: places to have at first behind the longest; more are taken
    when they are needed. Raises ValueError for a model some of whose layers keep something else
    than the keys and values of all tokens, such as a window's: there a rejected token cannot be
    taken back.
    """

    def __init__(self, read: DynamicCache, lengths: Sequence[int], room: int):
        for layer in read.layers:
            if type(layer) is not DynamicLayer:
                raise ValueError(
                    f"expected full attention in every layer, got a {type(layer).__name__}: "
                    "windows and recurrent states cannot take back rejected tokens"
                )
        self.lengths = list(lengths)
        self.stored = 0  # of the tree
        super().__init__(layers=[_Layer(layer, self) for layer in read.layers])
        self.reserve(self.width + room)

    @property
    def width(self) -> int:
        """Where trees start."""
        return max(self.lengths)

    @property
    def end(self) -> int:
        """Where the next nodes are written."""
        return self.width + self.stored

    def reserve(self, places: int) -> None:
        """Make room for so many places in all; what is there stays."""
        for layer in self.layers:
            if layer.keys.shape[2] < places:
                layer.keys = _longer(layer.keys, places, self.width)
                layer.values = _longer(layer.values, places, self.width)

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """Node ids of a path for each sequence, the root first: they now belong to it, and the
        rest of the tree is forgotten."""
        width = self.width
        # Behind the longest sequence a first child's first child lies where it belongs already.
        if any(
            len(path) and (length < width or list(path) != list(range(len(path))))
            for length, path in zip(self.lengths, paths, strict=True)
        ):
            self._move(paths)
        self.lengths = [
            length + len(path) for length, path in zip(self.lengths, paths, strict=True)
        ]
        self.stored = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences alone."""
        self.lengths = [self.lengths[row] for row in rows]
        for layer in self.layers:
            chosen = torch.tensor(rows, device=layer.keys.device)
            layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]

    def _move(self, paths: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, paths))
        nodes = torch.tensor([[*path, *[-1] * (longest - len(path))] for path in paths])
        source = kv_gather_indices(nodes, self.width)
        # Shorter paths move something behind their ends, too: it is overwritten, and never seen.
        target = torch.tensor(self.lengths)[:, None] + torch.arange(longest)
        for layer in self.layers:
            for part in (layer.keys, layer.values):
                shape = -1, part.shape[1], -1, part.shape[3]
                from_, to = (
                    each.to(part.device)[:, None, :, None].expand(shape)
                    for each in (source, target)
                )
                part.scatter_(2, to, part.gather(2, from_))


class _Layer(DynamicLayer):
    """One layer of a `TreeCache`, which knows the lengths."""

    def __init__(self, read: DynamicLayer, cache: TreeCache):
        super().__init__()
        self.keys, self.values, self.cache = read.keys, read.values, cache
        self.device, self.dtype = read.keys.device, read.keys.dtype
        self.is_initialized = True

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start = self.cache.end
        end = start + key.shape[2]
        self.keys[:, :, start:end] = key
        self.values[:, :, start:end] = value
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.cache.end


def _longer(part: Tensor, places: int, used: int) -> Tensor:
    # Zeros: a masked place still is a factor, and what lies in fresh memory may be no number.
    made = part.new_zeros(*part.shape[:2], places, part.shape[3])
    made[:, :, :used] = part[:, :, :used]
    return made
