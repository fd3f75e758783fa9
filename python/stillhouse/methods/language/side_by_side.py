"""Padded sequences put one behind the other, row by row and without a gap between them."""

from __future__ import annotations

import torch
from torch import Tensor


def row_lengths(name: str, ids: Tensor, mask: Tensor | None) -> Tensor:
    """int64 [B]: how many of the ids [B, T] count in each row; they come first.

    Raises ValueError for ids that are not [B, T], and for a mask that is not bool of their shape or
    has a token that counts behind one that does not.
    """
    if ids.dim() != 2:
        raise ValueError(f"{name}_ids must be [batch, tokens], got shape {tuple(ids.shape)}")
    if mask is None:
        return ids.new_full((len(ids),), ids.shape[1], dtype=torch.int64)
    if mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"{name}_mask must be bool {tuple(ids.shape)}, like the ids, got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(f"{name}_mask has a gap: the padding of {name}_ids must be on the right")
    return mask.sum(1)


def side_by_side(
    first: Tensor,
    second: Tensor,
    first_lengths: Tensor,
    second_lengths: Tensor,
    skip: Tensor | int = 0,
) -> Tensor:
    """[B, T] or [B, T, H]: row i is `first`'s tokens from `skip` on, then those of `second`; T is
    that of the longest row, and what stands behind a shorter one means nothing.

    A causal model needs neither a mask nor positions for such rows: nothing is left of a token but
    what belongs there.
    """
    taken = first_lengths - skip
    width = int((taken + second_lengths).max()) if len(taken) else 0
    position = torch.arange(width, device=first.device).expand(len(first), width)
    place = torch.where(
        position < taken[:, None],
        position + (first_lengths - taken)[:, None],
        position - taken[:, None] + first.shape[1],
    )
    both = torch.cat([first, second], 1)
    place = place.clamp(max=both.shape[1] - 1)
    return torch.take_along_dim(both, place if both.dim() == 2 else place[..., None], 1)
