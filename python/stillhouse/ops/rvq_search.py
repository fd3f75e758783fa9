"""Codes of residual quantization that are not the nearest one by one: a beam, and draws."""

from __future__ import annotations

import torch
from torch import Tensor

from . import rvq_autograd


def beam_codes(call, beam: int) -> Tensor:
    """int64 [G, N, Q]: of `beam` partial sums that are kept of each row, the last one's codes that
    are nearest. Of equally near ones the first, by the kept ones before and then by code."""
    groups, n, width = call.x.shape
    residual = call.x.to(call.tables.dtype)[:, :, None]  # [G, N, kept, D]
    codes = call.x.new_empty(groups, n, 1, 0, dtype=torch.int64)
    found = call.x.new_full((groups, n, call.stages), -1, dtype=torch.int64)
    all_packed = call.packed
    for stage in range(call.stages):
        table, packed, sizes = _stage(call, all_packed, stage)
        k, kept = min(beam, table.shape[2]), residual.shape[2]
        rows = residual.reshape(groups, n * kept, width)
        code, error = rvq_autograd.candidates(rows, table, packed, k, metric="l2", sizes=sizes)
        error = error.view(groups, n, kept * k).nan_to_num(nan=torch.inf)
        order = error.sort(dim=-1, stable=True).indices[..., :beam]
        code = code.view(groups, n, kept * k).gather(-1, order)
        parent = order // k
        codes = torch.cat([_taken(codes, parent), code[..., None]], -1)
        of_code = rvq_autograd.decode(code.view(groups, n * code.shape[-1], 1), table)
        residual = _taken(residual, parent) - of_code.view(*code.shape, width)
        last = codes[:, :, 0]
        deep = torch.ones_like(last[..., :1], dtype=torch.bool)
        if call.depth is not None:
            deep = call.depth[..., None] > stage
        # A row that ends here keeps what is best now, not what a later stage would have preferred.
        found[..., : stage + 1] = torch.where(deep, last, found[..., : stage + 1])
    return found


def _taken(of_kept: Tensor, parent: Tensor) -> Tensor:
    """[G, N, beam, W] of [G, N, kept, W]."""
    return of_kept.gather(2, parent[..., None].expand(*parent.shape, of_kept.shape[-1]))


def drawn_codes(call, temperature: float, seed: int, position: Tensor | None) -> Tensor:
    """int64 [G, N, Q]: code c of a stage with probability proportional to
    exp(-|r - c|^2 / temperature), for cosines exp(2 |r| cos(r, c) / temperature)."""
    residual = call.x.to(call.tables.dtype)
    found, all_packed = [], call.packed
    for stage in range(call.stages):
        table, packed, sizes = _stage(call, all_packed, stage)
        code, _ = rvq_autograd.candidates(
            residual,
            table,
            packed,
            1,
            metric=call.metric,
            sizes=sizes,
            sharpness=2 / temperature,
            seed=seed,
            node=stage,
            position=position,
        )
        if call.depth is not None:
            code = code.masked_fill(call.depth[..., None] <= stage, -1)
        found.append(code)
        residual = residual - rvq_autograd.decode(code, table)
    return torch.cat(found, -1)


def _stage(call, packed: Tensor, stage: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The table [G, 1, K, D] of a stage, the same as the search reads it, and its sizes."""
    number = stage if call.tables.shape[1] > 1 else 0
    of_stage = slice(number, number + 1)
    packed = packed[:, of_stage].contiguous() if packed.numel() > 0 else packed
    sizes = None if call.sizes is None else call.sizes[:, of_stage]
    return call.tables[:, of_stage], packed, sizes
