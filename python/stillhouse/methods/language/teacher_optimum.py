"""The teacher size at which a student does best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 1000


class Optimum(NamedTuple):
    """Where a curve over teacher sizes is lowest. ci: 95 % over seeds, or the neighbours of the
    lowest point where there is one curve. censored: "low" or "high" where it is at an end."""

    teacher: float
    ci: tuple[float, float]
    censored: str | None


def optimal_teacher(
    sizes: Sequence[float], metric: Sequence[float] | Tensor, *, seed: int = 0
) -> Optimum:
    """The teacher size of the smallest metric: the lowest point, moved to the vertex of the
    parabola in log size through it and its neighbours.

    sizes: [k], ascending. metric: [k], or [seeds, k], of which the mean counts; then `ci` is from
    1,000 resamples of the seeds. Raises ValueError for fewer than 3 sizes, sizes that do not
    ascend from above 0, another shape and a metric that is not finite.

    Defaults: ours; the paper takes the lowest point.

    Example:
        >>> from stillhouse.methods.language import optimal_teacher
        >>> optimum = optimal_teacher([10, 20, 40], [1.0, 0.5, 1.0])
        >>> round(optimum.teacher, 6), optimum.ci, optimum.censored
        (20.0, (10.0, 40.0), None)
    """
    x = torch.as_tensor(sizes, dtype=torch.float64)
    y = torch.as_tensor(metric, dtype=torch.float64)
    if len(x) < 3 or not bool((x[0] > 0) & (x.diff() > 0).all()):
        raise ValueError(f"expected at least 3 ascending sizes above 0, got {x.tolist()}")
    if y.dim() not in (1, 2) or y.shape[-1] != len(x) or y.numel() == 0:
        raise ValueError(f"expected a metric [{len(x)}] or [seeds, {len(x)}], got {tuple(y.shape)}")
    if not bool(y.isfinite().all()):
        raise ValueError("the metric has values that are not finite")
    curves = y.view(-1, len(x))
    teacher, lowest = _vertex(x, curves.mean(0))
    last = len(x) - 1
    if len(curves) == 1:
        ci = x[max(lowest - 1, 0)].item(), x[min(lowest + 1, last)].item()
    else:
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randint(len(curves), (RESAMPLES, len(curves)), generator=generator)
        each = torch.tensor([_vertex(x, curves[draw].mean(0))[0] for draw in draws])
        ci = tuple(
            each.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        )
    return Optimum(teacher, ci, {0: "low", last: "high"}.get(lowest))


def _vertex(x: Tensor, y: Tensor) -> tuple[float, int]:
    i = int(y.argmin())
    if i in (0, len(x) - 1):
        return x[i].item(), i
    a, b, c = x[i - 1 : i + 2].log().tolist()
    left, right = (y[i - 1] - y[i]).item(), (y[i + 1] - y[i]).item()
    bend = left * (c - b) + right * (b - a)
    if bend == 0:  # three equal points
        return x[i].item(), i
    return math.exp(b + 0.5 * (left * (c - b) ** 2 - right * (b - a) ** 2) / bend), i
