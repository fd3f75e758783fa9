"""Numbers that move in the course of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


def ramp(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 in a straight line to `end` at step `steps`, and `end` from there on.

    A ramp of 0 steps is at its end. Raises ValueError for a negative step or number of steps.

    Example:
        >>> from stillhouse.train import ramp
        >>> [ramp(step, 4, 1.0, 3.0) for step in (0, 1, 4, 9)]
        [1.0, 1.5, 3.0, 3.0]
    """
    if step < 0 or steps < 0:
        raise ValueError(f"steps are counted from 0, got step {step} of {steps}")
    if step >= steps:
        return end
    return start + (end - start) * step / steps


@runtime_checkable
class Schedule(Protocol):
    """A number that follows what training measures: `value` now, `update(...)` with what was
    measured, `state_dict` and `load_state_dict` so that a resumed run goes on where it was."""

    @property
    def value(self) -> float: ...

    def update(self, *args: Any, **kwargs: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
