"""Draft trees of speculative decoding: who is whose child, and what a model must know of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import tree_registered
from .tree_reference import MOST_NODES, PADDING

MASKS = ("bool", "bits", "additive")


class TreeLinks(NamedTuple):
    """Trees of T nodes, node 0 the root; -1 where there is none. `tree_build` makes them."""

    parents: Tensor  # int32 [B, T]; padded nodes -2
    first_child: Tensor  # int32 [B, T]
    next_sibling: Tensor  # int32 [B, T]
    depth: Tensor  # int32 [B, T], 0 of the root, -1 of padded nodes
    # int64 [B, T, ceil(T / 64)]: bit j of word w: node 64 w + j is an ancestor or the node itself.
    ancestors: Tensor


def tree_build(parents: Tensor) -> TreeLinks:
    """The links of trees that are given by their parents.

    parents: int32 [B, T], T from 1 to 1024: -1 of the root, node 0; of other nodes one that comes
    before them; padding at the end is -2. Children are in the nodes' order. A tree is at most 64
    deep, and a node has at most 64 children.

    Raises ValueError for shapes and, on the CPU, for parents that are no such tree (elsewhere that
    would make the device wait: build on the CPU what is not known to be one, and move it),
    TypeError for another dtype.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> links = ops.tree_build(torch.tensor([[-1, 0, 0, 1, -2]], dtype=torch.int32))
        >>> links.first_child.tolist(), links.next_sibling.tolist()
        ([[1, 3, -1, -1, -1]], [[-1, 2, -1, -1, -1]])
        >>> links.depth.tolist(), links.ancestors.flatten().tolist()
        ([[0, 1, 1, 2, -1]], [1, 3, 5, 11, 0])
    """
    check_nodes("parents", parents, torch.int32)
    if parents.dim() != 2 or not 1 <= parents.shape[1] <= MOST_NODES:
        raise ValueError(
            f"parents must be [B, T] with T from 1 to {MOST_NODES}, got {tuple(parents.shape)}"
        )
    parents = parents.contiguous()
    *links, bad = tree_registered.build(parents)
    if bad.is_cpu and not torch.compiler.is_compiling() and bool((bad >= 0).any()):
        row = int((bad >= 0).int().argmax())
        _explain_parent(parents[row].tolist(), int(bad[row]), row)
    return TreeLinks(parents, *links)


def _explain_parent(parents: list[int], node: int, row: int) -> None:
    """Raises what is wrong about a node."""
    parent = parents[node]
    reason = f"expected 0 to {node - 1}: a node comes after its parent"
    if node == 0:
        reason = "expected -1: node 0 is the root"
    elif PADDING in parents[:node]:
        reason = f"expected {PADDING}: padding is at the end"
    elif 0 <= parent < node:
        reason = "a tree is at most 64 deep, and a node has at most 64 children"
    raise ValueError(f"parents of tree {row} have {parent} at node {node}, {reason}")


def tree_paths(links: TreeLinks) -> Tensor:
    """Paths from the root to each leaf, int32 [B, L, D + 1] on the links' device, then -1.

    L is the largest number of leaves, in the nodes' order, D the largest depth. It reads the links
    on the CPU, which waits for a device.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> links = ops.tree_build(torch.tensor([[-1, 0, 0, 1]], dtype=torch.int32))
        >>> ops.tree_paths(links)
        tensor([[[ 0,  2, -1],
                 [ 0,  1,  3]]], dtype=torch.int32)
    """
    trees = []
    for parents, first_child in zip(
        links.parents.tolist(), links.first_child.tolist(), strict=True
    ):
        paths = []
        for node, child in enumerate(first_child):
            if child >= 0 or parents[node] == PADDING:
                continue
            path = []
            while node >= 0:
                path.append(node)
                node = parents[node]
            paths.append(path[::-1])
        trees.append(paths)
    longest = max((len(path) for paths in trees for path in paths), default=0)
    out = torch.full((len(trees), max(map(len, trees), default=0), longest), -1, dtype=torch.int32)
    for row, paths in enumerate(trees):
        for place, path in enumerate(paths):
            out[row, place, : len(path)] = torch.tensor(path, dtype=torch.int32)
    return out.to(links.parents.device)


def tree_mask(
    links: TreeLinks, kv_len: int = 0, mode: str = "bool", dtype: torch.dtype = torch.float32
) -> Tensor:
    """What each node may attend to: all `kv_len` tokens of the cache, its ancestors and itself.

    mode: "bool" [B, T, kv_len + T], True = attends; "additive" of `dtype`, 0 or -inf; "bits" int64
    [B, T, ceil((kv_len + T) / 64)], bit j of word w for column 64 w + j. A padded node attends to
    itself alone, since a row without any column has no softmax.

    Raises ValueError for an unknown mode, a negative kv_len, a dtype that is not a float's.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> links = ops.tree_build(torch.tensor([[-1, 0, 0]], dtype=torch.int32))
        >>> ops.tree_mask(links, kv_len=1).int()
        tensor([[[1, 1, 0, 0],
                 [1, 1, 1, 0],
                 [1, 1, 0, 1]]], dtype=torch.int32)
    """
    if mode not in MASKS:
        raise ValueError(f"mode must be one of {', '.join(MASKS)}, got {mode!r}")
    if kv_len < 0:
        raise ValueError(f"kv_len must be at least 0, got {kv_len}")
    if not dtype.is_floating_point:
        raise ValueError(f"an additive mask needs a float dtype, got {dtype}")
    device, size = links.parents.device, links.parents.shape[1]
    bit = torch.arange(64, device=device)
    mask = (links.ancestors[..., None] >> bit & 1).flatten(-2)[..., :size].bool()
    mask = mask | torch.eye(size, dtype=torch.bool, device=device)
    if kv_len:
        cache = (links.depth >= 0)[..., None].expand(-1, -1, kv_len)
        mask = torch.cat([cache, mask], -1)
    if mode == "bool":
        return mask
    if mode == "additive":
        return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, -math.inf)
    mask = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 64))
    return (mask.unflatten(-1, (-1, 64)).long() << bit).sum(-1)


def tree_positions(links: TreeLinks, start: int | Tensor) -> Tensor:
    """Each node's place in its sequence, int64 [B, T]: start + depth; a padded node has the root's.

    start: the root's, an int or int64 [B].
    """
    if isinstance(start, Tensor):
        if start.shape != links.depth.shape[:1]:
            raise ValueError(
                f"start must be an int or [{len(links.depth)}], got {tuple(start.shape)}"
            )
        start = start.to(links.depth.device)[:, None]
    return links.depth.clamp(min=0).long() + start


def kv_gather_indices(path: Tensor, kv_len: int | Tensor = 0) -> Tensor:
    """Where the cache entries of an accepted path lie: int64 [B, D + 1], to be gathered to the
    places kv_len, kv_len + 1, ... of a cache in which node i of the tree is at kv_len + i.

    path: `VerifyOut.path`. kv_len: an int or int64 [B], entries before the tree. Behind the path
    are the places themselves, so that one gather moves rows of all lengths; they hold nothing.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> ops.kv_gather_indices(torch.tensor([[0, 2, -1]]), kv_len=10)
        tensor([[10, 12, 12]])
    """
    if path.dim() != 2:
        raise ValueError(f"path must be [B, D + 1], got {tuple(path.shape)}")
    if isinstance(kv_len, Tensor):
        if kv_len.shape != path.shape[:1]:
            raise ValueError(f"kv_len must be an int or [{len(path)}], got {tuple(kv_len.shape)}")
        kv_len = kv_len.to(path.device)[:, None]
    places = torch.arange(path.shape[1], device=path.device)
    return torch.where(path >= 0, path.long(), places) + kv_len


def check_nodes(name: str, given: Tensor, dtype: torch.dtype) -> None:
    """What is given for each node has this dtype."""
    if not isinstance(given, Tensor) or given.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {getattr(given, 'dtype', type(given))}")
