"""Lines of progress for long work: how much is done, the rate, the time left."""

from __future__ import annotations

import time

EVERY = 10.0  # seconds between two lines


def time_left(seconds: float) -> str:
    """`1:02 left` of 62 seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"


class Progress:
    """Prints `NAME  17,272 of 82,872 rows  1,707 rows/s  0:38 left` every ten seconds.

    `unit` is the plural of what is counted.
    """

    def __init__(self, unit: str):
        self.unit = unit
        self._began = self._said = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        """So many of all units are done."""
        now = time.monotonic()
        if now - self._said < EVERY or not done:
            return
        self._said, rate = now, done / (now - self._began)
        print(
            f"{name}  {done:,} of {total:,} {self.unit}  {rate:,.0f} {self.unit}/s  "
            f"{time_left((total - done) / rate)}",
            flush=True,
        )
