"""Where the time of a run goes, on a CPU and on a GPU whose work is queued."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Clock:
    """Adds up seconds by name. On a CUDA device they are the device's own, measured by events and
    read when asked for, so that measuring never waits for the device."""

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`."""
        if not self.on_cuda:
            begin = time.perf_counter()
            yield
            self.add(name, time.perf_counter() - begin)
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def load_state_dict(self, seconds: Mapping[str, float]) -> None:
        """Continue from what `seconds` gave in an earlier process."""
        self._events.clear()
        self._seconds = dict(seconds)

    def seconds(self) -> dict[str, float]:
        """Seconds by name so far. Waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        for name, first, last in self._events:
            self.add(name, first.elapsed_time(last) / 1000)
        self._events.clear()
        return dict(self._seconds)
