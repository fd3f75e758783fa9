"""The distances of a training run to its teacher and to an oracle, and what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from stillhouse.train import power_law_fit


@dataclass
class Trace:
    """A training run: `steps`, and at each of them `proxy` = d(T || S) and `golden` = d(mu || S),
    in nats a token; `loss`, the mean training loss since the evaluation before (NaN at step 0).
    `rise_stderr` is the standard error of `rise`, both ends being of the same responses.
    Raises nothing. Defaults: an empty run.

    Example:
        >>> from stillhouse.methods.language import Trace
        >>> round(Trace(steps=[1, 2, 4], golden=[0.5, 0.2, 0.3]).rise, 6)
        0.1
    """

    steps: list[int] = field(default_factory=list)
    proxy: list[float] = field(default_factory=list)
    golden: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    rise_stderr: float = 0.0

    @property
    def rise(self) -> float:
        """golden(end) - min golden."""
        return self.golden[-1] - min(self.golden)


def detect(
    trace: Trace, *, warmup: float = 0, share: float = 0.3, sigmas: float = 3.0, in_a_row: int = 3
) -> dict[str, Any]:
    """Whether a run was hacked, with the oracle and without it.

    Without: a power law is fitted to the proxy over the first `share` of the logarithm of the steps
    after `warmup`, and continued. The run departs from it at the first of `in_a_row` evaluations
    that all lie above the law, or in whose course it falls by less than half of what the law says,
    either by more than `sigmas` standard errors. With: `hacked` if from its minimum to the end the
    golden distance rises by more than 3 standard errors, and the proxy falls on after that minimum;
    `u_shape` if it rises so and the minimum is before 70 % of the steps. (A student that was closer
    to the oracle than its teacher is rises, too, up to the teacher's own distance.)
    Returns `law` (`train.PowerLaw`), `departure_step` (None: it never departs), `hacked`, `rise`,
    `u_shape` and `advice`, one line. Raises ValueError for fewer than 5 evaluations in the window
    of the fit, and proxies that are not positive.

    Defaults: ours. The standard error above a law is that of a prediction: outside of the window
    the error of the law's own slope is the larger part, and the spread of the fit would not do.

    Example:
        >>> from stillhouse.methods.language import Trace, detect
        >>> steps = [round(10 * 1.2**i) for i in range(30)]
        >>> flat_from_100 = [max(s, 1) ** -0.5 if s < 100 else 0.1 for s in steps]
        >>> detect(Trace(steps, flat_from_100, flat_from_100))["departure_step"]
        107
    """
    points = [(s, y) for s, y in zip(trace.steps, trace.proxy, strict=True) if s > warmup]
    if not points:
        raise ValueError(f"there is no evaluation after {warmup} steps of warm-up")
    steps, proxy = zip(*points, strict=True)
    end = steps[0] * (steps[-1] / steps[0]) ** share
    law = power_law_fit(steps, proxy, window=(0, end))
    log_s, log_y = [math.log(s) for s in steps], [math.log(y) for y in proxy]
    fitted = [x for s, x in zip(steps, log_s, strict=True) if s <= end]
    mean = sum(fitted) / len(fitted)
    spread = sum((x - mean) ** 2 for x in fitted)

    def is_above(i: int) -> bool:
        error = law.sigma * math.sqrt(1 + 1 / len(fitted) + (log_s[i] - mean) ** 2 / spread)
        # 1e-9: an exact law has no spread, only rounding.
        return log_y[i] - (law.a - law.b * log_s[i]) > sigmas * error + 1e-9

    def is_slow(i: int) -> bool:
        half = 0.5 * law.b * (log_s[i] - log_s[i - in_a_row])
        error = law.sigma * math.sqrt(2)
        return log_y[i - in_a_row] - log_y[i] < half - sigmas * error - 1e-9

    departure, run = None, 0
    for i in range(len(fitted), len(steps)):
        run = run + 1 if is_above(i) else 0
        if run == in_a_row or (i - in_a_row >= len(fitted) - 1 and is_slow(i)):
            departure = steps[i - in_a_row + 1]
            break
    lowest = trace.golden.index(min(trace.golden))
    has_risen = trace.rise > 3 * trace.rise_stderr and trace.rise > 0
    falls_on = min(trace.proxy[lowest + 1 :], default=math.inf) < trace.proxy[lowest]
    advice = "the proxy follows its power law: go on"
    if departure is not None:
        advice = (
            "draw responses anew; else use more prompts, else several responses to each; "
            f"else stop at step {departure}, where the proxy leaves its power law"
        )
    return {
        "law": law,
        "departure_step": departure,
        "hacked": has_risen and falls_on,
        "rise": trace.rise,
        "u_shape": has_risen and trace.steps[lowest] < 0.7 * trace.steps[-1],
        "advice": advice,
    }
