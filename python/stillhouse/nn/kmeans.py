"""k-means on the search of residual quantization: no matrix of rows by centres."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.nn.ranks import Ranks
from stillhouse.ops.rows import check_floats


def kmeans(
    x: Tensor,
    k: int,
    *,
    iterations: int = 10,
    seed: int,
    mask: Tensor | None = None,
    metric: str = "l2",
) -> Tensor:
    """k centres of rows, by Lloyd's iterations from k rows drawn at random.

    Args:
        x: rows [N, D], float32, bfloat16, float16 or float64. Rows that are not finite do not
            count.
        k: centres. Of fewer rows than that, every row is a centre and some are so twice.
        iterations: at least 1.
        seed: of what is drawn: the rows to begin with, and for a centre that no row is nearest to
            another row, with a chance in proportion to its squared distance from its own centre.
        mask: bool [N], False = the row does not count.
        metric: "l2", or "cosine" for the nearest direction. A centre is the mean of its rows in
            either; rows of length 1 make it the spherical form.

    Returns:
        [k, D], float32 (float64 of float64).

    Raises:
        ValueError: shapes that do not fit, no row that counts, numbers below 1.
        TypeError: a dtype outside the list above.

    Defaults: 10 iterations (vector-quantize-pytorch; EnCodec and Mimi have 50).

    Example:
        >>> import torch
        >>> from stillhouse.nn import kmeans
        >>> kmeans(torch.tensor([[1.0], [8.0], [2.0], [9.0]]), 2, seed=0).sort(0).values
        tensor([[1.5000],
                [8.5000]])
    """
    check_floats(x)
    if x.dim() != 2:
        raise ValueError(f"x must be [N, D], got {tuple(x.shape)}")
    if k < 1 or iterations < 1:
        raise ValueError(f"expected k >= 1 and iterations >= 1, got {k} and {iterations}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:1]):
        raise ValueError(f"mask must be bool [{len(x)}], got {mask.dtype} {tuple(mask.shape)}")
    with torch.no_grad():
        rows = (x if x.dtype == torch.float64 else x.float()).detach()[None]
        counted = rows_that_count(rows, None if mask is None else mask[None])
        if not counted.any():
            raise ValueError("there is no row to make centres of")
        generator = torch.Generator().manual_seed(seed)
        return centres(rows, k, iterations, generator, counted, metric, Ranks(False))[0][0]


def rows_that_count(x: Tensor, mask: Tensor | None) -> Tensor:
    """bool [G, N]: finite rows that the mask does not leave out."""
    finite = x.isfinite().all(-1)
    return finite if mask is None else finite & mask


def centres(
    x: Tensor,
    k: int,
    iterations: int,
    generator: torch.Generator,
    counted: Tensor,
    metric: str,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Centres [G, K, D] of rows [G, N, D], how many rows each has, [G, K], and their sums."""

    def drawn(weight: Tensor | float) -> Tensor:
        keys = ranks.draw(x.shape[:2], generator).to(x.device) / weight
        keys = keys.masked_fill(~counted, torch.inf)
        return ranks.lowest(keys, k, lambda index: _taken(x, index))[0]

    found = drawn(1.0)
    for _ in range(iterations):
        tables = found[:, None]
        nearest = ops.rvq(x, tables, metric=metric, mask=counted)
        counts, sums = ops.rvq_statistics(x, nearest.codes, tables)
        ranks.sum_(counts, sums)
        counts, sums = counts[:, 0], sums[:, 0]
        used = counts > 0
        # Looking at it must not make an accelerator wait.
        if x.device.type != "cpu" or not used.all():
            spare = drawn(nearest.error[..., 0].double().clamp(min=1e-30))
            spare = _taken(spare, ((~used).cumsum(-1) - 1).clamp(min=0))
            sums = torch.where(used[..., None], sums, spare)
            counts = counts.clamp(min=1)
        found = sums / counts[..., None]
    return found, counts, sums


def _taken(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
