"""What each of several teachers counts, overall or in each row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse import ops

Weights = Sequence[float] | Tensor | str | None


def mixed(found: list[tuple[Tensor, ops.Stats]], weights: Weights) -> Tensor:
    shares = shares_of([stats.teacher_entropy for _, stats in found], weights)
    return sum(w.to(each) * each for w, (each, _) in zip(shares, found, strict=True))


def shares_of(entropies: list[Tensor], weights: Weights) -> Tensor:
    """Weights that add up to 1, [K, 1] or of each row [K, ...]."""
    if isinstance(weights, str):
        if weights != "entropy":
            raise ValueError(f"weights must be numbers, None or 'entropy', got {weights!r}")
        return torch.softmax(-torch.stack(entropies), 0)
    count = len(entropies)
    given = torch.ones(count) if weights is None else torch.as_tensor(weights)
    given = given.to(entropies[0].device, torch.float64)
    if given.shape != (count,) or not (given >= 0).all() or not 0 < given.sum() < float("inf"):
        raise ValueError(
            f"expected {count} weights from 0 on, one of them above it, got {given.tolist()}"
        )
    return (given / given.sum())[(...,) + (None,) * entropies[0].dim()]
