"""The line through the best teachers of several student sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CapacityGapLaw:
    """T* = slope S + intercept. counted: what sizes count, as it was said at the fit. covariance:
    of (slope, intercept), NaN for two points."""

    slope: float
    intercept: float
    r2: float
    covariance: Tensor
    counted: str

    def teacher_for(self, student: float) -> tuple[float, float, float]:
        """The best teacher's size for this student: (size, size - 2 s.e., size + 2 s.e.)."""
        row = torch.tensor([student, 1.0], dtype=torch.float64)
        size = self.slope * student + self.intercept
        error = 2 * float(row @ self.covariance @ row) ** 0.5
        return size, size - error, size + error

    def student_for(self, teacher: float) -> tuple[float, float, float]:
        """The student whose best teacher this is, and 2 s.e. around; ValueError where the line does
        not rise."""
        if self.slope <= 0:
            raise ValueError(f"the line does not rise (slope {self.slope:.4g}): it has no inverse")
        size = (teacher - self.intercept) / self.slope
        _, low, high = self.teacher_for(size)
        error = (high - low) / 2 / self.slope
        return size, size - error, size + error


def fit_capacity_gap_law(
    students: Sequence[float],
    teachers: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    censored: Sequence[str | None] | None = None,
    counted: str | Sequence[str] = "all parameters",
) -> CapacityGapLaw:
    """The least-squares line through best teachers [m] of students [m].

    weights: [m], of the squares. censored: that of each `Optimum`; such points are left out.
    counted: what the sizes count ("all parameters", "without embeddings", "units"), once or for
    each point. Raises ValueError for fewer than 2 points that count, numbers that are not finite,
    all points censored, and sizes that are counted in different ways.

    Defaults: equal weights (the paper).

    Example:
        >>> from stillhouse.methods.language import fit_capacity_gap_law
        >>> law = fit_capacity_gap_law([10, 20, 40], [13.5, 38.5, 88.5])
        >>> round(law.slope, 6), round(law.intercept, 6), [round(x) for x in law.teacher_for(30)]
        (2.5, -11.5, [64, 63, 64])
    """
    names = {counted} if isinstance(counted, str) else set(counted)
    if len(names) != 1:
        raise ValueError(f"sizes must be counted in one way, got {', '.join(sorted(names))}")
    flags = [None] * len(students) if censored is None else list(censored)
    if flags and all(flag is not None for flag in flags):
        sides = " and ".join(sorted(set(flags)))
        raise ValueError(
            f"every optimum is at the {sides} end of its teachers: there is none to fit to"
        )
    columns = [students, teachers, [1.0] * len(students) if weights is None else weights, flags]
    points = [row[:3] for row in zip(*columns, strict=True) if row[3] is None]
    if len(points) < 2:
        raise ValueError(f"a line needs at least 2 points, got {len(points)}")
    s, t, w = torch.tensor(points, dtype=torch.float64).unbind(-1)
    if not bool(torch.stack([s, t, w]).isfinite().all()) or not bool((w > 0).all()):
        raise ValueError("sizes must be finite and weights positive")
    rows = torch.stack([s, torch.ones_like(s)], -1)
    inverse = torch.linalg.inv(rows.T @ (w[:, None] * rows))
    line = inverse @ (rows.T @ (w * t))
    squares = w * (t - rows @ line) ** 2
    spread = (w * (t - (w * t).sum() / w.sum()) ** 2).sum()
    free = len(points) - 2
    covariance = inverse * (squares.sum() / free if free else math.nan)
    return CapacityGapLaw(
        slope=line[0].item(),
        intercept=line[1].item(),
        r2=1 - (squares.sum() / spread).item(),
        covariance=covariance,
        counted=names.pop(),
    )
