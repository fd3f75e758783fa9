"""From uniform tokens to a text in a few steps, each of which rewrites all of it or a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["argmax_unrolled", "sample"]
PATIENCE = 10  # steps of "sample" before standing still ends it


def refine(
    logits_of: Callable[[Tensor], Tensor],
    y: Tensor,
    mask: Tensor,
    *,
    steps: int,
    mode: Mode = "argmax_unrolled",
    temperature: float = 0.3,
    share: float = 0.3,
    generator: torch.Generator,
) -> Tensor:
    """`y` after `steps` steps, or fewer: int64 [B, T]. logits_of: y to logits [B, T, V]; mask: bool
    [B, T], the tokens that there are.

    A step of "sample" replaces each token with probability `share` by a sample at `temperature`,
    and ends it where after at least 10 steps nothing changes. One of "argmax_unrolled" takes the
    likeliest tokens, and for the ceil(share n) of n that are the least certain those that are
    likeliest then; it ends where nothing changes.
    Raises ValueError for steps < 1, an unknown mode, temperature <= 0 and a share outside (0, 1].

    Defaults: share 0.3 and 10 steps (SUNDAE by a public re-implementation, which samples at 0.8
    without a source), temperature 0.3, of the thesis's 0.1 to 0.4.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language.unrolled_decoding import refine
        >>> def counts(y):  # a token's likeliest value is one more than the token to its left
        ...     return torch.nn.functional.one_hot((y.roll(1, 1) + 1) % 9, 9).float()
        >>> y, seed = torch.tensor([[3, 3, 3]]), torch.Generator().manual_seed(0)
        >>> refine(counts, y, y > 0, steps=1, generator=seed)
        tensor([[5, 4, 4]])
    """
    if steps < 1 or temperature <= 0 or not 0 < share <= 1:
        raise ValueError(
            "expected steps >= 1, temperature > 0 and a share in (0, 1], got "
            f"{steps}, {temperature}, {share}"
        )
    if mode not in ("argmax_unrolled", "sample"):
        raise ValueError(f"mode must be 'argmax_unrolled' or 'sample', got {mode!r}")
    for step in range(1, steps + 1):
        before, logits = y, logits_of(y)
        if mode == "sample":
            chosen = torch.rand(y.shape, generator=generator, device=y.device) < share
            y = torch.where(chosen & mask, sample(logits, temperature, generator), y)
        else:
            certain, likeliest = logits.softmax(-1).max(-1)
            rank = certain.masked_fill(~mask, torch.inf).argsort(dim=1, stable=True).argsort(1)
            again = logits_of(likeliest).argmax(-1)
            y = torch.where(rank < share * mask.sum(1, keepdim=True), again, likeliest)
        if torch.equal(y[mask], before[mask]) and (mode != "sample" or step >= PATIENCE):
            break
    return y


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A token of each row of logits [B, T, V], int64 [B, T], without a gradient."""
    cumulated = (logits.detach().double() / temperature).softmax(-1).cumsum(-1)
    options = dict(generator=generator, dtype=torch.float64, device=logits.device)
    threshold = torch.rand(*logits.shape[:-1], 1, **options) * cumulated[..., -1:]
    return torch.searchsorted(cumulated, threshold, right=True)[..., 0]
