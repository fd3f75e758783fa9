"""Products with dual-binary weights in plain torch: what a kernel computes, on any device.

A weight [N, K] in groups of G columns, g = K / G, is w = alpha_1 b_1 + alpha_2 b_2, b bits:

    y[m, n] = sum_g ( alpha_1[n, g] sum_{k in g} b_1[n, k] x[m, k] + the same of plane 2 )
    dx = dy w,   dalpha_p[n, g] = sum_{k in g} (dy^T x)[n, k] b_p[n, k]

Planes are int32 [2, N, ceil(K / 32)]: bit k % 32 of word k // 32, the lowest first, and zeros
beyond K. Scales are [2, N, g].
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def pack(planes: Tensor) -> Tensor:
    """Words int32 [2, N, ceil(K / 32)] of bool [2, N, K]."""
    words = -(-planes.shape[-1] // WORD)
    padded = torch.nn.functional.pad(planes, (0, words * WORD - planes.shape[-1]))
    # The highest bit of an int32 counts -2^31. No two addends share a bit, so nothing overflows.
    values = [1 << bit for bit in range(WORD - 1)] + [-(1 << (WORD - 1))]
    values = torch.tensor(values, dtype=torch.int32, device=planes.device)
    bits = padded.view(*planes.shape[:-1], words, WORD).to(torch.int32)
    return (bits * values).sum(-1, dtype=torch.int32)


def unpack(words: Tensor, columns: int) -> Tensor:
    """bool [2, N, K] of words, K = `columns`."""
    shifts = torch.arange(WORD, dtype=torch.int32, device=words.device)
    bits = (words[..., None] >> shifts) & 1
    return bits.bool().flatten(-2)[..., :columns]


def dequantize(planes: Tensor, alpha: Tensor) -> Tensor:
    """The weight [N, K] of bool planes [2, N, K], in the dtype of the scales [2, N, g]."""
    groups = planes.unflatten(-1, (alpha.shape[-1], -1))
    # A bit chooses; 0 times a scale would let an infinite one through.
    first, second = torch.where(groups, alpha[..., None], 0)
    return (first + second).flatten(1)


def matmul(x: Tensor, words: Tensor, alpha: Tensor, bias: Tensor | None, dtype) -> Tensor:
    """y [M, N] of x [M, K], summed in `dtype`."""
    weight = dequantize(unpack(words, x.shape[-1]), alpha.to(dtype))
    y = x.to(dtype) @ weight.mT
    return y if bias is None else y + bias.to(dtype)


def gradient(
    upstream: Tensor,
    x: Tensor,
    words: Tensor,
    alpha: Tensor,
    dtype: torch.dtype,
    want_x: bool,
    want_alpha: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] and dalpha [2, N, g] in `dtype`, of upstream [M, N]."""
    planes, upstream = unpack(words, x.shape[-1]), upstream.to(dtype)
    d_x = upstream @ dequantize(planes, alpha.to(dtype)) if want_x else None
    return d_x, of_scales(upstream.mT @ x.to(dtype), planes, alpha) if want_alpha else None


def of_scales(of_weight: Tensor, planes: Tensor, alpha: Tensor) -> Tensor:
    """What a gradient of the weight [N, K] is to the scales [2, N, g], the planes held fixed."""
    groups = (of_weight * planes).unflatten(-1, (alpha.shape[-1], -1))
    return groups.sum(-1)
