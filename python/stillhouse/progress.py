"""Lines of progress for long work: how much is done, the rate, the time left."""

from __future__ import annotations

import time

EVERY = 10.0  # seconds between two lines


def time_left(seconds: float) -> str:
    """`1:02 left` of 62 seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"


class Progress:
    """Prints `NAME  17,272 of 82,872 rows  1,707 rows/s  0:38 left` every ten seconds.

    `unit` is the plural of what is counted; `begun` of them were done by an earlier process.
    """

    def __init__(self, unit: str, begun: int = 0):
        self.unit, self.begun = unit, begun
        self._began = self._said = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        """So many of all units are done."""
        now = time.monotonic()
        if now - self._said < EVERY or done <= self.begun:
            return
        self._said, rate = now, (done - self.begun) / (now - self._began)
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        print(
            f"{name}  {done:,} of {total:,} {self.unit}  {shown} {self.unit}/s  "
            f"{time_left((total - done) / rate)}",
            flush=True,
        )
