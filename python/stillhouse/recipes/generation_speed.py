"""How fast models write: tokens a second of `generate()`, one sequence at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stillhouse.progress import Progress
from stillhouse.train.forward import evaluating

REPEATS, MOST, FEWEST = 5, 64, 2
SECONDS = 2.0  # that the slowest model may take to write once


def generation_speed(models: Mapping[str, Any], prompt: Tensor) -> tuple[dict[str, float], int]:
    """Tokens a second of each of `models`, and how many tokens each wrote at a time.

    prompt: ids [1, T]; its reading is part of the time. All write as many tokens, from 2 to 64, the
    likeliest ones; the slowest takes about two seconds for them. After two rounds that warm up the
    models take turns, and the median of five rounds counts.
    """

    def seconds(model: Any, count: int) -> float:
        since = time.perf_counter()
        # The tokens' way back to the CPU ends the time where the work is queued.
        model.generate(
            prompt,
            attention_mask=prompt.new_ones(prompt.shape),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        ).tolist()
        return time.perf_counter() - since

    with evaluating(*models.values()):
        for _ in range(2):
            slowest = max(seconds(model, FEWEST) for model in models.values()) / FEWEST
        count = max(FEWEST, min(MOST, int(SECONDS / slowest)))
        found: dict[str, list[float]] = {name: [] for name in models}
        progress, total = Progress("rounds"), REPEATS * len(models)
        for number in range(REPEATS):
            for place, (name, model) in enumerate(models.items(), 1):
                found[name].append(count / seconds(model, count))
                progress("generation", number * len(models) + place, total)
    return {name: statistics.median(each) for name, each in found.items()}, count
