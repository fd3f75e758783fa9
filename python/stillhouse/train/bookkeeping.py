"""What `DistillTrainer` does at the calls of the training loop that are not its own methods."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback


class Bookkeeping(TrainerCallback):
    """Calls of the training loop that are not methods of the Trainer."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.since = 0.0

    def on_train_begin(self, *args: Any, **options: Any) -> None:
        self.since = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, **options: Any) -> None:
        # Data-parallel wrappers average the gradients of the model, not those of the objective.
        for parameter in self.trainer.objective_parameters():
            if parameter.grad is not None:
                parameter.grad = self.trainer.accelerator.reduce(parameter.grad, "mean")

    def on_step_end(self, *args: Any, **options: Any) -> None:
        # The loop zeroes the gradients of the model only.
        for parameter in self.trainer.objective_parameters():
            parameter.grad = None
        now = time.perf_counter()
        self.trainer.clock.add("total", now - self.since)
        self.trainer.finish_step(now - self.since)
        self.since = now

    def on_evaluate(self, *args: Any, metrics: Any = None, **options: Any) -> None:
        self.trainer.note_evaluation(metrics or {})
        self.since = time.perf_counter()

    def on_save(self, *args: Any, **options: Any) -> None:
        self.since = time.perf_counter()
