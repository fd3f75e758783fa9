"""Does a model's confidence say how often it is right?"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Reliability(NamedTuple):
    """A reliability diagram of M bins, [M] each: how many predictions fell into bin m, their mean
    confidence and the share of them that was right (float64; NaN where a bin is empty)."""

    count: Tensor
    confidence: Tensor
    accuracy: Tensor


def reliability(confidence: Any, correct: Any, bins: int = 10) -> Reliability:
    """Predictions by their confidence, in M equal bins (m - 1) / M < confidence <= m / M.

    confidence: [n] floats in [0, 1], the probability of what was predicted; correct: [n] bool, or
    numbers that are 0 or 1. Tensors, arrays or lists. A confidence of 0 is of the first bin.
    Raises ValueError for no prediction at all, shapes that differ, bins < 1, a confidence outside
    [0, 1] or not a number, and a `correct` that is neither 0 nor 1.

    Example:
        >>> from stillhouse.train import reliability
        >>> reliability([0.9, 0.8, 0.2], [True, False, False], bins=2).accuracy.tolist()
        [0.0, 0.5]
    """
    confidence, correct = torch.as_tensor(confidence).detach(), torch.as_tensor(correct)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if confidence.dim() != 1 or confidence.shape != correct.shape or len(confidence) == 0:
        raise ValueError(
            "confidence and correct must both be [n] with n >= 1, got "
            f"{tuple(confidence.shape)} and {tuple(correct.shape)}"
        )
    inside = (confidence >= 0) & (confidence <= 1)
    if not inside.all():
        wrong = confidence[~inside][0].item()
        raise ValueError(f"a confidence is a probability in [0, 1], got {wrong:.6g}")
    if not ((correct == 0) | (correct == 1)).all():
        raise ValueError("correct must be bool, or 0 and 1")
    # In the confidence's own precision: a float32 of 0.3 is not above the edge 3 / 10.
    edges = (torch.arange(1, bins, dtype=torch.float64) / bins).to(confidence)
    bin_of = torch.bucketize(confidence, edges)
    count = bin_of.bincount(minlength=bins)
    sums = (bin_of.bincount(x.double(), minlength=bins) for x in (confidence, correct))
    return Reliability(count, *(total / count for total in sums))


def ece(confidence: Any, correct: Any, bins: int = 10) -> float:
    """Expected calibration error: sum_m count_m / n |accuracy_m - confidence_m|, in [0, 1].

    Arguments and errors as in `reliability`. Source: Guo et al. 2017, arXiv 1706.04599; ten
    bins are those of FIRST, arXiv 2408.12168. A model that says the base rate of everything has 0,
    so accuracy or a likelihood belongs beside it.

    Example:
        >>> from stillhouse.train import ece
        >>> round(ece([0.95, 0.95, 0.85, 0.65, 0.65], [1, 0, 1, 1, 0]), 4)
        0.27
    """
    bars = reliability(confidence, correct, bins)
    gap = (bars.accuracy - bars.confidence).abs() * bars.count / bars.count.sum()
    return gap[bars.count > 0].sum().item()
