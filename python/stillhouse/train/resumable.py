"""`transformers.Trainer` with checkpoints that are whole or do not count, stopped in time."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from stillhouse.train.checkpoints import (
    STATE_FILE,
    WHOLE_WEIGHTS,
    is_whole,
    load_whole_optimizer,
    mark_complete,
    newest_complete,
    prune,
)


class NonFiniteLoss(ValueError):
    """Training ran into NaN or infinity; the message names the step and the batch."""


class ResumableTrainer(Trainer):
    """What `DistillTrainer` adds to the Trainer's checkpoints: none is taken for whole that is not,
    any number of processes goes on from one, and no weight that is not finite gets into one."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Train. `resume_from_checkpoint=True` continues from the newest complete checkpoint."""
        if resume_from_checkpoint is True:
            # The Trainer's own search would take a torn one.
            resume_from_checkpoint = newest_complete(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"no complete checkpoint in {self.args.output_dir} to resume from")
        if resume_from_checkpoint:
            resume_from_checkpoint = str(resume_from_checkpoint)
        self._forget_evaluation()
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **options)

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed at its end, the Trainer's loop would take one step too many.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **options)

    def _forget_evaluation(self) -> None:
        """Undo what an evaluation before the training has prepared.

        It marks the model as prepared without wrapping it, and what is marked is not wrapped again:
        each process would go on to train a model of its own, without a word.
        """
        wrapped = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if wrapped or not getattr(self.model, "_is_accelerate_prepared", False):
            return
        if self.model_wrapped is self.model:
            self.accelerator.free_memory()
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.require_finite_weights()
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            # An older run's folder would lend its marker to a half-written new one.
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # The Trainer deletes old checkpoints before the new one has its marker; prune() after it.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            torch.save(self.run_state(), folder / STATE_FILE)
        own = self.process_state()
        if own:
            torch.save(own, folder / self._process_file)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            if limit:
                prune(folder.parent, limit, self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Tests kill the process here: weights are written, the optimiser's state is not.
        time.sleep(float(os.environ.get("STILLHOUSE_TEST_CHECKPOINT_SLEEP", "0")))
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        whole = Path(checkpoint) / WHOLE_WEIGHTS
        if self.is_fsdp_enabled and not is_whole(checkpoint):
            raise ValueError(
                f"{checkpoint} was not written by sharded processes, which cannot go on with it: "
                "resume without FSDP, or give the student folder to --student"
            )
        if self.is_fsdp_enabled or not whole.is_file():
            super()._load_from_checkpoint(checkpoint, model)
            return
        # Sharded processes have written it; the Trainer would leave it to sharded ones.
        state = torch.load(whole, map_location="cpu", weights_only=True)
        (self.model if model is None else model).load_state_dict(state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.is_fsdp_enabled and is_whole(checkpoint):
            load_whole_optimizer(self.model, self.optimizer, self.lr_scheduler, Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE_FILE
        if not path.is_file():
            raise ValueError(f"{checkpoint} has no {STATE_FILE}: it is not one of this trainer's")
        if not (Path(checkpoint) / "scheduler.pt").is_file():
            raise ValueError(
                f"{checkpoint} was saved with save_only_model: without the optimiser's state it "
                "would continue as another run"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        own = Path(checkpoint) / self._process_file
        # A process that was not there when it was saved has nothing of its own.
        self.load_run_state(state, torch.load(own, weights_only=True) if own.is_file() else {})

    @property
    def _process_file(self) -> str:
        return f"process_{self.args.process_index}.pt"

    # --- what a run has beside the Trainer's own state ----------------------------------------

    def run_state(self) -> dict[str, Any]:
        """What all processes have in common; nothing, unless a trainer says otherwise."""
        return {}

    def process_state(self) -> dict[str, Any]:
        """What each process has of its own; likewise."""
        return {}

    def load_run_state(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Go on from both."""

    # --- stopping in time ---------------------------------------------------------------------

    def require_finite(self, loss: Tensor, records: Tensor | None) -> None:
        """Raise NonFiniteLoss for a loss that cannot be trained on."""
        if self.model.training and not torch.isfinite(loss):
            made_of = "" if records is None else f", records {records.tolist()} of the data"
            raise NonFiniteLoss(
                f"loss is {loss.item()} in step {self.state.global_step + 1}{made_of}: "
                f"{self._last_good()}. Usual causes: a learning rate too high, float16 that "
                "overflows, a broken record"
            )

    def require_finite_weights(self) -> None:
        """Raise NonFiniteLoss, on all processes, where a weight of one is NaN or infinite."""
        named = dict(self.model.named_parameters())
        own = (getattr(each, "_local_tensor", each).detach() for each in named.values())
        broken = torch.stack([~torch.isfinite(each).all() for each in own]).float()
        broken = self.accelerator.reduce(broken, "sum")
        if broken.any():
            name = list(named)[int(broken.argmax())]
            raise NonFiniteLoss(
                f"{name} has non-finite values after step {self.state.global_step}, nothing "
                f"was saved: {self._last_good()}. Usual cause: a learning rate too high"
            )

    def _last_good(self) -> str:
        path = newest_complete(self.args.output_dir)
        return f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"
