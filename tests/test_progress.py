from __future__ import annotations

import pytest

from stillhouse import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_with_rate_and_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    report = progress.Progress("rows")
    for seconds in range(0, 26):
        clock[0] = float(seconds)
        report("part 3", 100 * seconds, 10_000)
    assert capsys.readouterr().out.splitlines() == [
        "part 3  1,000 of 10,000 rows  100 rows/s  1:30 left",
        "part 3  2,000 of 10,000 rows  100 rows/s  1:20 left",
    ]


def test_nothing_done_is_no_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    report = progress.Progress("rows")
    clock[0] = 60.0
    report("part 3", 0, 10)
    assert capsys.readouterr().out == ""


def test_what_an_earlier_process_has_done_is_no_rate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    report = progress.Progress("steps", 20)
    clock[0] = 10.0
    report("stage", 20, 40)
    clock[0] = 20.0
    report("stage", 25, 40)
    assert capsys.readouterr().out == "stage  25 of 40 steps  0.25 steps/s  1:00 left\n"
