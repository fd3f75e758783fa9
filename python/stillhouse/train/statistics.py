"""What an objective reports, averaged over micro-batches, ranks and steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class StepStatistics:
    """Collects the parts of each micro-batch, closes them once an optimiser step.

    The loss has the denominator of the whole step, so its micro-batches add up; everything else is
    a mean over the rows of its batch and counts by their number.
    """

    def __init__(self) -> None:
        self.rows = 0.0  # supervised rows so far, over all ranks
        self._sums: dict[str, Tensor] = {}  # of the step that is under way, on the device
        self._steps: list[dict[str, float]] = []  # closed since the last summary

    def add(self, parts: Mapping[str, Tensor], rows: int) -> None:
        """The parts of one micro-batch with this number of supervised rows."""
        values = {name: value.detach() * rows for name, value in parts.items()}
        values["loss"] = parts["loss"].detach()
        values["rows"] = torch.tensor(float(rows))
        for name, value in values.items():
            value = value.to(parts["loss"].device, torch.float32)
            self._sums[name] = self._sums.get(name, 0) + value

    def finish(self, accelerator: Any, seconds: float) -> dict[str, float] | None:
        """Average the step over all ranks and keep it; None where nothing was supervised."""
        if not self._sums:
            return None
        # One reduction and one read of the device for everything.
        total = accelerator.reduce(torch.stack(list(self._sums.values())), "sum").tolist()
        sums = dict(zip(self._sums, total, strict=True))
        self._sums = {}
        rows = sums.pop("rows")
        stats = {name: value / max(rows, 1) for name, value in sums.items()}
        stats["loss"] = sums["loss"] / accelerator.num_processes
        self.rows += rows
        self._steps.append({**stats, "rows": rows, "seconds": seconds})
        return stats if rows else None

    def summary(self) -> dict[str, float]:
        """Means since the last summary, without the loss, and `tokens_per_second`."""
        steps, self._steps = self._steps, []
        if not steps:
            return {}
        rows = sum(step["rows"] for step in steps)
        result = {}
        for name in set().union(*steps) - {"loss", "rows", "seconds"}:
            having = [step for step in steps if name in step]  # a part may come now and then
            weight = sum(step["rows"] for step in having)
            result[name] = sum(step[name] * step["rows"] for step in having) / max(weight, 1)
        result["tokens_per_second"] = rows / sum(step["seconds"] for step in steps)
        return result

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to log and count as if nothing had happened."""
        return {"rows": self.rows, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows, self._steps = state["rows"], list(state["steps"])
