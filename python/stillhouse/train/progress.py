"""One line of progress a logging interval: loss, rate, time left."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from stillhouse.progress import time_left

# What of a log is worth a line, in this order; everything is in the log history anyway.
SHOWN = ("loss", "acceptance", "agreement", "t", "eval_perplexity", "eval_forward_kl")


class TrainingProgress(TrainerCallback):
    """Prints `step 20/110  loss 3.21  …  1,234 tokens/s  1:02 left` when the trainer logs."""

    def __init__(self, name: str = ""):
        self.name = name
        self.began = 0.0
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first_step = time.monotonic(), state.global_step

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        when = f"step {state.global_step}/{state.max_steps}" if state.max_steps else "at the start"
        parts = [f"{self.name} {when}".strip()]
        parts += [f"{name} {logs[name]:.4g}" for name in SHOWN if name in logs]
        if "tokens_per_second" in logs:
            parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
        done = state.global_step - self.first_step
        if done > 0:
            left = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step)
            parts.append(time_left(left))
        print("  ".join(parts), flush=True)
