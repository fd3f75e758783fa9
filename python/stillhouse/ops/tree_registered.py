"""The registered ops of draft trees: their shapes for the compiler, and what runs without a kernel.

All ride on one kernel (csrc/tree).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import divergence_autograd, tree_reference
from .divergence_autograd import warn_without_kernel
from .tree_reference import MOST_DEPTH


def has_kernel(x: Tensor) -> bool:
    """Whether the kernels are built for its device; says so where they are not."""
    if divergence_autograd.has_kernel(x):
        return True
    warn_without_kernel(x, "draft tree")
    return False


def build(parents: Tensor) -> tuple[Tensor, ...]:
    """first_child, next_sibling, depth, ancestors, and the first wrong node of each tree."""
    if not has_kernel(parents):
        return tree_reference.build(parents)
    return divergence_autograd.kernels().tree_build(parents)


def verify(target: Tensor, *arguments) -> tuple[Tensor, ...]:
    """n_accepted, path, out_tokens, accept_prob, status; the arguments as the op has them, without
    the target, which comes first."""
    tokens, parents, first_child, next_sibling, *others = arguments
    if not has_kernel(target):
        run = tree_reference.verify
    else:
        run = divergence_autograd.kernels().tree_verify
    return run(tokens, parents, first_child, next_sibling, target, *others)


def width(size: int) -> int:
    """Of a path in trees of this many nodes: the root and what may be accepted."""
    return min(size - 1, MOST_DEPTH) + 1


def _fake_build(parents):
    batch, size = parents.shape
    links = (torch.empty_like(parents) for _ in range(3))
    words = parents.new_empty(batch, size, (size + 63) // 64, dtype=torch.int64)
    return *links, words, parents.new_empty(batch)


def _fake_verify(
    tokens,
    parents,
    first_child,
    next_sibling,
    target,
    draft,
    kind,
    temperature,
    seed,
    position,
    coins,
    mode,
    is_prob,
    epsilon,
    delta,
):
    batch, size = tokens.shape
    paths = (tokens.new_empty(batch, width(size)) for _ in range(2))
    accept_prob = tokens.new_empty(batch, dtype=torch.float32)
    return tokens.new_empty(batch), *paths, accept_prob, tokens.new_empty(batch)


def register(namespace: str) -> None:
    """Shapes of the ops whose schemas csrc/ops.cpp has put into this namespace."""
    torch.library.register_fake(f"{namespace}::tree_build", _fake_build)
    torch.library.register_fake(f"{namespace}::tree_verify", _fake_verify)


register("stillhouse")
