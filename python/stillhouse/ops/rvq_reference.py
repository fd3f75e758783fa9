"""Residual quantization in plain torch: what the kernels compute, on any device.

Rows [G, N, D], tables [G, T, K, D], T = 1 where all stages share one, codes [G, N, Q].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .random import philox_gumbel


def _codes_of(tables: Tensor, stage: int, codes: Tensor) -> Tensor:
    """Of each row its code in this stage, [G, N, D]; zeros for -1."""
    table = tables[:, stage if tables.shape[1] > 1 else 0]
    index = codes[..., stage, None].clamp(min=0).expand(-1, -1, table.shape[-1])
    return table.gather(1, index) * (codes[..., stage, None] >= 0)


def _scores(rows: Tensor, tables: Tensor, stage: int, metric: str, sizes: Tensor | None) -> Tensor:
    """[G, N, K], the higher the nearer: r c - |c|^2 / 2, or r c / |c|."""
    number = stage if tables.shape[1] > 1 else 0
    table = tables[:, number]
    if metric == "cosine":
        scores = rows @ torch.nn.functional.normalize(table, dim=-1).mT
    else:
        scores = rows @ table.mT - table.square().sum(-1)[:, None] / 2
    if sizes is None:
        return scores
    beyond = torch.arange(table.shape[1], device=rows.device) >= sizes[:, number, None]
    return scores.masked_fill(beyond[:, None], -torch.inf)


def encode(
    x: Tensor,
    tables: Tensor,
    metric: str,
    sizes: Tensor | None,
    depth: Tensor | None,
    stages: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes, out, error, margin."""
    residual, out = x.to(tables.dtype), torch.zeros_like(x, dtype=tables.dtype)
    codes = torch.full((*x.shape[:2], stages), -1, dtype=torch.int64, device=x.device)
    error, margin = (residual.new_zeros(codes.shape) for _ in range(2))
    for stage in range(stages):
        scores = _scores(residual, tables, stage, metric, sizes)
        top = scores.topk(min(2, scores.shape[-1]), -1).values
        deep = torch.ones_like(codes[..., 0], dtype=torch.bool) if depth is None else stage < depth
        finite = top[..., 0].isfinite()
        # The first of equal ones, which argmax does not promise on every device.
        first = (scores == top[..., :1]).to(torch.uint8).argmax(-1)
        codes[..., stage] = torch.where(deep & finite, first, -1)
        code = _codes_of(tables, stage, codes)
        residual, out = residual - code, out + code
        broken = torch.where(finite, 0.0, torch.nan)
        gap = (
            2 * (top[..., 0] - top[..., -1])
            if top.shape[-1] > 1
            else torch.full_like(broken, torch.inf)
        )
        error[..., stage] = torch.where(deep, residual.square().sum(-1) + broken, 0)
        margin[..., stage] = torch.where(deep, gap + broken, 0)
        out = torch.where((deep & ~finite)[..., None], torch.nan, out)
    return codes, out, error, margin


def encode_coupled(
    x: Tensor,
    coupling: Tensor,
    tables: Tensor,
    metric: str,
    sizes: Tensor | None,
    depth: Tensor | None,
    stages: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """codes, the codes' numbers and error."""
    width, x = tables.shape[-1], x.to(tables.dtype)
    taken = torch.zeros_like(x)
    codes, error = [], []
    for stage in range(stages):
        columns = slice(stage * width, (stage + 1) * width)
        rows = x[..., columns] - taken @ coupling[..., columns]
        number = stage if tables.shape[1] > 1 else 0
        deep = None if depth is None else (depth - stage).clamp(0, 1)
        table, of_table = tables[:, number, None], None if sizes is None else sizes[:, number, None]
        code, taken[..., columns], gap, _ = encode(rows, table, metric, of_table, deep, 1)
        codes.append(code), error.append(gap)
    return torch.cat(codes, -1), taken, torch.cat(error, -1)


def candidates(
    x: Tensor,
    table: Tensor,
    k: int,
    metric: str,
    sizes: Tensor | None,
    sharpness: float,
    seed: int,
    node: int,
    position: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """k codes of each row, and their squared distances."""
    rows = x.to(table.dtype)
    scores = _scores(rows, table, 0, metric, sizes)
    if sharpness > 0:
        if position is None:
            position = torch.arange(scores[..., 0].numel(), device=x.device).view(x.shape[:2])
        noise = philox_gumbel(seed, position, node, scores.shape[-1])
        scores = sharpness * scores.double() + noise
    best, codes = scores.sort(dim=-1, descending=True, stable=True)
    best, codes = best[..., :k], codes[..., :k]
    finite = best[..., :1].abs() < torch.inf
    codes = torch.where(finite & (best > -torch.inf), codes, -1)
    gaps = [(rows - _codes_of(table, 0, codes[..., i, None])).square().sum(-1) for i in range(k)]
    return codes, torch.where(codes >= 0, torch.stack(gaps, -1), torch.nan)


def decode(codes: Tensor, tables: Tensor) -> Tensor:
    """The sum of the codes."""
    out = tables.new_zeros(*codes.shape[:2], tables.shape[-1])
    for stage in range(codes.shape[-1]):
        out = out + _codes_of(tables, stage, codes)
    return out


def _residuals(x: Tensor, codes: Tensor, tables: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Stage, and what was left of the rows before and after it."""
    before = x.to(tables.dtype)
    for stage in range(codes.shape[-1]):
        after = before - _codes_of(tables, stage, codes)
        yield stage, before, after
        before = after


def errors(x: Tensor, codes: Tensor, tables: Tensor) -> Tensor:
    """Squared distances [G, N, Q] after each stage; 0 where there is no code."""
    gaps = [after.square().sum(-1) for _, _, after in _residuals(x, codes, tables)]
    return torch.stack(gaps, -1) * (codes >= 0)


def _summed(rows: Tensor, codes: Tensor, size: int) -> Tensor:
    """[G, K, W]: rows [G, N, W] added up by their code [G, N]."""
    groups, _, width = rows.shape
    known = (codes >= 0)[..., None]
    index = codes.clamp(min=0)[..., None].expand_as(rows)
    return rows.new_zeros(groups, size, width).scatter_add_(1, index, rows * known)


def statistics(x: Tensor, codes: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """counts [G, T, K] and sums [G, T, K, D]."""
    counts, sums = tables.new_zeros(tables.shape[:3]), torch.zeros_like(tables)
    for stage, before, _ in _residuals(x, codes, tables):
        number, size = stage if tables.shape[1] > 1 else 0, tables.shape[2]
        counts[:, number] += _summed(torch.ones_like(before[..., :1]), codes[..., stage], size)[
            ..., 0
        ]
        sums[:, number] += _summed(before, codes[..., stage], size)
    return counts, sums


def gradient(
    upstream: Tensor, x: Tensor, codes: Tensor, tables: Tensor, want_x: bool, want_tables: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of the squared distances, to the rows and to the tables."""
    d_x = torch.zeros_like(x, dtype=tables.dtype) if want_x else None
    d_tables = torch.zeros_like(tables) if want_tables else None
    for stage, _, after in _residuals(x, codes, tables):
        slope = 2 * upstream[..., stage, None] * after * (codes[..., stage, None] >= 0)
        if want_x:
            d_x += slope
        if want_tables:
            number = stage if tables.shape[1] > 1 else 0
            d_tables[:, number] -= _summed(slope, codes[..., stage], tables.shape[2])
    return d_x, d_tables
