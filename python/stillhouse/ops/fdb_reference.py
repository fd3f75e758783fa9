"""Products with dual-binary weights in plain torch: what a kernel computes, on any device.

A weight [N, K] in groups of G columns, g = K / G, is w = alpha_1 b_1 + alpha_2 b_2, b bits:

    y[m, n] = sum_g ( alpha_1[n, g] sum_{k in g} b_1[n, k] x[m, k] + the same of plane 2 )
    dx = dy w,   dalpha_p[n, g] = sum_{k in g} (dy^T x)[n, k] b_p[n, k]

Planes are bool [2, N, K], scales [2, N, g]. On disk planes are words int32 [2, N, ceil(K / 32)]:
bit k % 32 of word k // 32, the lowest first, and zeros beyond K. For kernels they are tiles of 16
rows, int32 [ceil(N / 16), g, ceil(G / 32), 2, 16], in which each group begins a word, and scales
are [ceil(N / 16), g, 2, 16]; bits and scales of rows beyond N are zeros
(csrc/dual_binary/kernel.h).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

WORD, BLOCK = 32, 16


def pack(planes: Tensor) -> Tensor:
    """Words int32 [..., ceil(K / 32)] of bool [..., K]."""
    words = -(-planes.shape[-1] // WORD)
    padded = pad(planes, (0, words * WORD - planes.shape[-1]))
    # The highest bit of an int32 counts -2^31. No two addends share a bit, so nothing overflows.
    values = [1 << bit for bit in range(WORD - 1)] + [-(1 << (WORD - 1))]
    values = torch.tensor(values, dtype=torch.int32, device=planes.device)
    bits = padded.view(*planes.shape[:-1], words, WORD).to(torch.int32)
    return (bits * values).sum(-1, dtype=torch.int32)


def unpack(words: Tensor, columns: int) -> Tensor:
    """bool [..., K] of words, K = `columns`."""
    shifts = torch.arange(WORD, dtype=torch.int32, device=words.device)
    bits = (words[..., None] >> shifts) & 1
    return bits.bool().flatten(-2)[..., :columns]


def tile_planes(planes: Tensor, groups: int) -> Tensor:
    """Tiles of bool planes, as a view that is not contiguous."""
    width = planes.shape[2] // groups
    return _tile_words(pack(planes.unflatten(2, (groups, width))))


def untile_planes(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Bool planes of tiles."""
    words = _untile_words(tiles, rows)
    return unpack(words, columns // tiles.shape[1]).flatten(2)


def tile_words(words: Tensor, groups: int, columns: int) -> Tensor:
    """Tiles of the words of a file, as a view that is not contiguous."""
    if columns % (groups * WORD):
        return tile_planes(unpack(words, columns), groups)
    return _tile_words(words.unflatten(2, (groups, -1)))


def untile_words(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """The words of a file, of tiles."""
    if columns % (tiles.shape[1] * WORD):
        return pack(untile_planes(tiles, rows, columns))
    return _untile_words(tiles, rows).flatten(2)


def tile_scales(alpha: Tensor) -> Tensor:
    """Scales [2, N, g] as kernels read them, differentiable."""
    padded = pad(alpha, (0, 0, 0, -alpha.shape[1] % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).permute(1, 3, 0, 2).contiguous()


def untile_scales(scales: Tensor, rows: int) -> Tensor:
    """Scales [2, N, g], differentiable."""
    return scales.permute(2, 0, 3, 1).flatten(1, 2)[:, :rows].contiguous()


def _tile_words(words: Tensor) -> Tensor:
    """Of words [2, N, g, words of a group]."""
    padded = pad(words, (0, 0, 0, 0, 0, -words.shape[1] % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).permute(1, 3, 4, 0, 2)


def _untile_words(tiles: Tensor, rows: int) -> Tensor:
    return tiles.permute(3, 0, 4, 1, 2).flatten(1, 2)[:, :rows].contiguous()


def dequantize(planes: Tensor, alpha: Tensor) -> Tensor:
    """The weight [N, K] of planes, in the dtype of the scales."""
    groups = planes.unflatten(-1, (alpha.shape[-1], -1))
    # A bit chooses; 0 times a scale would let an infinite one through.
    first, second = torch.where(groups, alpha[..., None], 0)
    return (first + second).flatten(1)


def matmul(x: Tensor, planes: Tensor, alpha: Tensor, bias: Tensor | None, dtype) -> Tensor:
    """y [M, N] of x [M, K], summed in `dtype`."""
    y = x.to(dtype) @ dequantize(planes, alpha.to(dtype)).mT
    return y if bias is None else y + bias.to(dtype)


def quantize(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """int8 [M, K] of x [M, K], and what an integer of 1 is worth, float32 [M, g]. A group with a
    number that is not finite is zeros, worth that."""
    x = x.float().unflatten(1, (groups, -1))
    steps = x.abs().amax(-1) / 127
    known = ((steps > 0) & steps.isfinite())[..., None]
    integers = torch.where(known, x / torch.where(known, steps[..., None], 1), 0)
    return integers.round().clamp(-127, 127).flatten(1).to(torch.int8), steps


def numbers(values: Tensor, steps: Tensor) -> Tensor:
    """What int8 [M, K] with these steps [M, g] stand for, float32."""
    return (values.unflatten(1, (steps.shape[1], -1)) * steps[..., None]).flatten(1)


def gradient(
    upstream: Tensor,
    x: Tensor,
    planes: Tensor,
    alpha: Tensor,
    dtype: torch.dtype,
    want_x: bool,
    want_alpha: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] and dalpha [2, N, g] in `dtype`, of upstream [M, N]."""
    upstream = upstream.to(dtype)
    d_x = upstream @ dequantize(planes, alpha.to(dtype)) if want_x else None
    return d_x, of_scales(upstream.mT @ x.to(dtype), planes, alpha) if want_alpha else None


def of_scales(of_weight: Tensor, planes: Tensor, alpha: Tensor) -> Tensor:
    """What a gradient of the weight [N, K] is to the scales [2, N, g], the planes held fixed."""
    groups = (of_weight * planes).unflatten(-1, (alpha.shape[-1], -1))
    return groups.sum(-1)
