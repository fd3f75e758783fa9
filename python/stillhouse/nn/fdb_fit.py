"""Scales of dual-binary groups: which two numbers make the four levels that are nearest to a group.

A group's levels are 0, a1, a2, a1 + a2, and each of its weights takes the nearest. Rows here are
groups: [R, G] of them, scales [2, R]. Every candidate is rounded to float16 before it is judged, so
that what is chosen is what is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("paper", "mse", "ls")
ROUNDS = 20
# Candidates are the largest |w| times 2^(-i / 12): the paper's half of it is the one of i = 12.
STEPS, FINENESS = 52, 12
# Groups that are fitted at a time: their numbers stay in a core's cache.
PART = 4096


def fit(groups: Tensor, method: str) -> Tensor:
    """Scales float16 [2, R] of groups [R, G], float32 or float64."""
    parts = [_fit(part, method) for part in groups.split(PART)]
    return torch.cat(parts, 1).half() if parts else groups.new_zeros(2, 0, dtype=torch.float16)


def _fit(groups: Tensor, method: str) -> Tensor:
    if method == "paper":
        return of_scale(_rounded(groups.abs().amax(-1) / 2))
    alpha = of_scale(search_scale(groups))
    return alternate(groups, alpha) if method == "ls" else alpha


def of_scale(scale: Tensor) -> Tensor:
    """2 s and -s, of s [R]: levels -s, 0, s, 2 s."""
    return torch.stack([2 * scale, -scale])


def search_scale(groups: Tensor, signs: tuple[float, ...] = (1.0, -1.0)) -> Tensor:
    """The s [R] of least squared error among the candidates, of these signs."""
    largest = groups.abs().amax(-1)
    best = torch.zeros_like(largest)
    least = torch.full_like(largest, torch.inf)
    for sign in signs:
        for step in range(STEPS):
            scale = _rounded(sign * largest * 2 ** (-step / FINENESS))
            # Where a scale has become 0, so have all levels.
            unit = torch.where(scale == 0, 1, scale)[:, None]
            level = (groups / unit).round_().clamp_(-1, 2) * scale[:, None]
            error = level.sub_(groups).square_().sum(-1)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def nearest(groups: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Of each number its nearest level and the level's code b1 + 2 b2, uint8; of two as near as
    each other the lower code. groups [..., G], alpha [2, ...]."""
    first, second = alpha[0, ..., None], alpha[1, ..., None]
    value, code = torch.zeros_like(groups), torch.zeros_like(groups, dtype=torch.uint8)
    least = groups.abs()
    for number, level in enumerate((first, second, first + second), start=1):
        gap = (groups - level).abs()
        closer = gap < least
        value, least = torch.where(closer, level, value), torch.where(closer, gap, least)
        code = code.masked_fill_(closer, number)
    return value, code


def bits(code: Tensor) -> Tensor:
    """b1 and b2, bool [2, ...], of codes."""
    return torch.stack([code & 1, code >> 1]).bool()


def alternate(groups: Tensor, alpha: Tensor, rounds: int = ROUNDS) -> Tensor:
    """From these scales on, nearest levels and least squares in turns; the best that were met.

    A group whose error has not become less is done."""
    best, least = alpha.clone(), torch.full_like(alpha[0], torch.inf)
    rows = torch.arange(len(groups), device=groups.device)
    for turn in range(rounds + 1):
        value, code = nearest(groups, alpha)
        error = (value - groups).square_().sum(-1)
        better = error < least[rows]
        rows, alpha, error = rows[better], alpha[:, better], error[better]
        best[:, rows], least[rows] = alpha, error
        if turn == rounds or not len(rows):
            break
        groups = groups[better]
        alpha = _rounded(least_squares(groups, bits(code[better]), alpha))
    return best


def least_squares(groups: Tensor, planes: Tensor, alpha: Tensor) -> Tensor:
    """The scales that are best with these planes [2, R, G].

    Where planes coincide or one is empty there is not one pair of them: then one scale moves, and
    the other stays what it is in `alpha`.
    """
    first, second = planes.to(groups.dtype)
    n1, n2, n12 = first.sum(-1), second.sum(-1), (first * second).sum(-1)
    r1, r2 = (first * groups).sum(-1), (second * groups).sum(-1)
    determinant = n1 * n2 - n12.square()
    divisor = determinant.clamp(min=1)  # of counts: an integer
    both = torch.stack([(n2 * r1 - n12 * r2) / divisor, (n1 * r2 - n12 * r1) / divisor])
    alone = torch.stack(
        [
            torch.where(n1 > 0, (r1 - alpha[1] * n12) / n1.clamp(min=1), alpha[0]),
            torch.where((n1 == 0) & (n2 > 0), r2 / n2.clamp(min=1), alpha[1]),
        ]
    )
    return torch.where(determinant > 0.5, both, alone)


def _rounded(x: Tensor) -> Tensor:
    return x.half().to(x.dtype)
