"""From one number a row to one number a batch: the averages that papers use, each by its name."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Over = Literal["tokens", "sequences", "batch", "rows"] | None


def reduce(
    per_row: Tensor,
    mask: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    over: Over = "tokens",
    sequence: Tensor | None = None,
    count: Tensor | float | None = None,
) -> Tensor:
    """Reduce `per_row` ([N] or [B, T], any float dtype) to a scalar.

    With w = `weight` (default 1) where `mask` (bool, True = counts) holds and 0 elsewhere:

    - "tokens": sum(w l) / sum(w);
    - "sequences": the mean of each sequence's own sum(w l) / sum(w), over sequences that count;
    - "batch": sum(w l) / B;
    - "rows": sum(w l) / number of all rows, masked ones included;
    - None: w l, not reduced.

    `sequence` (int64, shape of `per_row`) says which sequence a row is of; a [B, T] input knows.
    `count` replaces the denominator (the sum of weights, the number of sequences, B, the rows)
    with a global one, as gradient accumulation and data parallelism need.

    Rows that do not count are never read into the sum, so NaN there is harmless; when nothing
    counts the result is 0 with a zero gradient. Raises ValueError for shapes that do not match
    and where "batch" or "sequences" cannot know its sequences.
    """
    for name, other in (("mask", mask), ("weight", weight), ("sequence", sequence)):
        if other is not None and other.shape != per_row.shape:
            raise ValueError(
                f"{name} has shape {tuple(other.shape)}, per_row {tuple(per_row.shape)}: "
                "one value a row is needed"
            )
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool (True = this row counts), got {mask.dtype}")

    if weight is None:
        weight = torch.ones_like(per_row)
    weight = weight.to(per_row.dtype)
    if mask is not None:
        weight = weight.masked_fill(~mask, 0)
    # where(), not a product alone: 0 * NaN would put the NaN of a masked row into the sum.
    weighted = torch.where(weight != 0, per_row, 0) * weight

    if over is None:
        return weighted
    if over == "tokens":
        return _divide(weighted.sum(), weight.sum() if count is None else count)
    if over == "rows":
        return _divide(weighted.sum(), per_row.numel() if count is None else count)
    if over == "batch":
        if count is None:
            if per_row.dim() != 2:
                raise ValueError("over='batch' on [N] rows needs count=B, the number of sequences")
            count = per_row.shape[0]
        return _divide(weighted.sum(), count)
    if over == "sequences":
        return _mean_of_sequences(weighted, weight, sequence, count)
    raise ValueError(f"over must be tokens, sequences, batch, rows or None, got {over!r}")


def _mean_of_sequences(
    weighted: Tensor, weight: Tensor, sequence: Tensor | None, count: Tensor | float | None
) -> Tensor:
    if sequence is None:
        if weighted.dim() != 2:
            raise ValueError("over='sequences' on [N] rows needs sequence=, the item of each row")
        sequence = torch.arange(len(weighted), device=weighted.device)[:, None].expand_as(weighted)
    sequence = sequence.reshape(-1)
    size = int(sequence.max()) + 1 if sequence.numel() else 0
    sums = weighted.new_zeros(size).index_add(0, sequence, weighted.reshape(-1))
    weights = weight.new_zeros(size).index_add(0, sequence, weight.reshape(-1))
    present = weights > 0
    means = sums / torch.where(present, weights, 1)
    return _divide(means.sum(), present.sum() if count is None else count)


def _divide(total: Tensor, count: Tensor | float) -> Tensor:
    """`total` / `count`, and 0 with a zero gradient where the count is 0."""
    count = torch.as_tensor(count, dtype=total.dtype, device=total.device)
    return total / torch.where(count > 0, count, 1)
