"""What every family shares: a point of the grid, and an implementation that is measured there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, order=True)
class Cell:
    """One point: a family, what is computed, in which form, on which shape and dtype."""

    family: str
    kind: str
    form: str
    dtype: str
    rows: int
    columns: int

    def __str__(self) -> str:
        shape = f"{self.rows}x{self.columns}"
        return f"{self.family} {self.kind} {self.form} {shape} {self.dtype}"

    @property
    def cost(self) -> float:
        """A rough share of the time of a run, for the estimate of what is left."""
        return 1 + self.rows * self.columns / 25e6


def _runs_everywhere(cell: Cell) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """One implementation.

    `build(cell)` gives the function that is timed together with its backward. `refuses(cell)` says
    in one line why a cell cannot be run here, or None. `in_place` marks a gradient that is written
    over the student's logits, `warms_whole` an implementation that must see the full shape before
    its memory is measured (a compiler's own memory is not the op's).
    """

    name: str
    build: Callable[[Cell], Callable[[Tensor, Tensor], Tensor]]
    refuses: Callable[[Cell], str | None] = field(default=_runs_everywhere)
    in_place: bool = False
    warms_whole: bool = False
