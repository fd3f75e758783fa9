"""`transformers.Trainer` with a teacher: every objective of this library, nothing else new."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from stillhouse.train.bookkeeping import Bookkeeping
from stillhouse.train.clock import Clock
from stillhouse.train.examples import collate
from stillhouse.train.forward import FrozenTeacher, RowForward
from stillhouse.train.metrics import sequence_sums, summarize
from stillhouse.train.objective import LogitRows, Objective
from stillhouse.train.on_policy import AdaptiveShare, OnPolicy
from stillhouse.train.progress import TrainingProgress
from stillhouse.train.resumable import ResumableTrainer
from stillhouse.train.rows import RowIndex, supervised_rows
from stillhouse.train.statistics import StepStatistics


class DistillTrainer(ResumableTrainer):
    """Trains `model` (any causal LM, a peft one included) to minimise `objective`.

    `objective(student, teacher, batch)` sees the supervised rows only, and makes no logits of them
    that it does not need: a divergence takes chunks of them. `teacher` is a causal LM with the same
    vocabulary; it is put on the training device and never trained. Or it is a
    `teachers.StoredTeacher`: then the batches bring what it said, and the evaluation does without
    one. An objective that needs none may do without, or keep one for the evaluation. `vocab_size`
    leaves padded columns out. Everything else, keyword arguments included, is
    `transformers.Trainer`: accumulation, mixed precision, gradient checkpointing, data-parallel and
    sharded training, resume, trackers.

    The loss is a mean over the supervised tokens of a whole optimiser step, across micro-batches
    and ranks. `on_policy` lets the student write responses of its own while it trains, and
    `adaptive_share` moves how many; an objective with a method `revise` has them corrected
    first. The log then has their share of the targets, `on_policy`.
    Evaluation gives `eval_loss` (nats a token), `eval_perplexity` and, with a teacher,
    `eval_forward_kl`, `eval_reverse_kl`, `eval_acceptance`, `eval_agreement`.

    Raises ValueError where the objective needs a teacher and there is none, for several GPUs in one
    process, where FSDP was asked for and accelerate would not shard, for an FSDP configuration or
    an objective that sharded processes could not save, and for responses of a sharded student or
    with a stored teacher; NonFiniteLoss while training.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        objective: Objective,
        teacher: nn.Module | Callable[..., Any] | None = None,
        vocab_size: int | None = None,
        on_policy: OnPolicy | None = None,
        adaptive_share: AdaptiveShare | None = None,
        name: str = "",
        **options: Any,
    ):
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process would split the batch behind our back: start "
                "one process a GPU (torchrun, accelerate launch) or set CUDA_VISIBLE_DEVICES"
            )
        if teacher is None and getattr(objective, "needs_teacher", True):
            raise ValueError(f"{type(objective).__name__} compares with a teacher: pass teacher=")
        if args.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor belongs to the Trainer's own loss: smoothing is an option "
                "of the objective here, ops.CrossEntropy(label_smoothing=...)"
            )
        # The collator's batch carries more than the model's arguments.
        args.remove_unused_columns = False
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False  # it would warn that there is nothing to pin for
        options.setdefault("data_collator", collate)
        super().__init__(model, args, compute_metrics=_summary, **options)
        asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
        if asked and not self.is_fsdp_enabled:
            raise ValueError(
                f"FSDP was asked for, but accelerate does not shard with {args.world_size} "
                f"processes on {args.device.type}: each would hold a whole copy; use DDP "
                "(--multi_gpu)"
            )
        self.objective = objective
        if hasattr(objective, "use_student"):
            objective.use_student(self.model)
        if self.is_fsdp_enabled:
            self._check_sharding()
        self.vocab_size = vocab_size
        # Ours is a per-token mean over the whole step, of labels counted from the second on.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.student_rows = RowForward(self.model)
        self.needs_teacher = getattr(objective, "needs_teacher", True)
        if isinstance(teacher, nn.Module):
            teacher = FrozenTeacher(teacher.to(args.device))
        self.teacher = teacher
        # Held-out text is compared with a model: what a few columns say is another number.
        self.reference = teacher if isinstance(teacher, FrozenTeacher) else None
        self.on_policy, self.adaptive_share = on_policy, adaptive_share
        if on_policy is not None:
            self._check_on_policy()
        self.clock = Clock(args.device)
        self.statistics = StepStatistics()
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(Bookkeeping(self))
        if not args.disable_tqdm:
            self.add_callback(TrainingProgress(name))

    def _check_sharding(self) -> None:
        kind = self.accelerator.state.fsdp_plugin.state_dict_type
        if kind != StateDictType.FULL_STATE_DICT:
            raise ValueError(
                f"fsdp_state_dict_type is {kind.name}: only FULL_STATE_DICT leaves a student and "
                "checkpoints that can be read as they are"
            )
        if self.objective_parameters():
            raise ValueError(
                f"{type(self.objective).__name__} has parameters of its own, which FSDP does not "
                "take into the student's optimiser: use DDP"
            )

    def _check_on_policy(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("a sharded student cannot respond while it trains: use DDP")
        if self.needs_teacher and self.reference is None:
            raise ValueError("a stored teacher knows nothing of new responses: on_policy needs one")
        if hasattr(self.objective, "revise"):
            teacher = self.reference and self.reference.model
            self.on_policy.revise = functools.partial(
                self.objective.revise, self.model, teacher, **self.on_policy.options
            )

    def get_batch_samples(self, *args: Any, **options: Any) -> tuple[list, Tensor | None]:
        """A step's micro-batches and the number of their targets; the student responds in them."""
        batches, count = super().get_batch_samples(*args, **options)
        if self.on_policy is None or not batches:
            return batches, count
        first = self.state.global_step * self.args.gradient_accumulation_steps
        with self.clock.measure("responses"):
            for micro, batch in enumerate(batches):
                batches[micro], share = self.on_policy(
                    self.model, batch, first + micro, process=self.args.process_index
                )
                batches[micro]["on_policy"] = torch.tensor(share)
        return batches, self._get_num_items_in_batch(batches, self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        batch, index = self._prepare(inputs)
        count = index.row.numel() if num_items_in_batch is None else num_items_in_batch
        # A step without any target has the loss 0, not 0 / 0.
        count = torch.as_tensor(count, device=self.args.device).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Gradients are averaged over ranks, and this mean is over all ranks' tokens.
            count = count / self.accelerator.num_processes
        batch["denominator"] = count
        with self.clock.measure("teacher"):
            teacher = self.teacher(batch, index) if self.needs_teacher else None

        def compute(student: LogitRows) -> dict[str, Tensor]:
            with self.clock.measure("loss"):
                return self.objective(student, teacher, batch)

        parts = self.student_rows(model, batch, index, compute)
        self.require_finite(parts["loss"], batch.get("record"))
        if "on_policy" in batch:
            parts["on_policy"] = batch["on_policy"]
        self.statistics.add(parts, index.row.numel())
        return (parts["loss"], parts) if return_outputs else parts["loss"]

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        with self.clock.measure("micro_steps"):
            return super().training_step(*args, **options)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Sums of each sequence instead of [B, T, V] logits; `_summary` makes them metrics."""
        with torch.no_grad():
            batch, index = self._prepare(self._prepare_inputs(inputs))
            teacher = self.reference(batch, index) if self.reference else None
            count = len(batch["labels"])
            sums = self.student_rows(
                model,
                batch,
                index,
                lambda rows: sequence_sums(rows, teacher, count, vocab_size=self.vocab_size),
            )
        # The Trainer computes metrics only where there are labels; the numbers of tokens will do.
        return None, sums, sums[:, 0]

    def _prepare(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], RowIndex]:
        if "labels" not in inputs:
            raise ValueError(f"a batch needs labels, this one has {', '.join(inputs)}")
        return {**inputs, "vocab_size": self.vocab_size}, supervised_rows(inputs["labels"])

    def finish_step(self, seconds: float) -> None:
        """Close the books of an optimiser step and tell the objective."""
        stats = self.statistics.finish(self.accelerator, seconds)
        if stats is not None and hasattr(self.objective, "update"):
            self.objective.update(stats, self.state.global_step, self.state.max_steps)
        if stats is not None and self.adaptive_share is not None:
            self.adaptive_share.update(stats, self.state.global_step, self.state.max_steps)

    def note_evaluation(self, metrics: Mapping[str, float]) -> None:
        """An evaluation has ended, on all ranks with the same numbers."""
        if self.adaptive_share is not None and "eval_loss" in metrics:
            self.adaptive_share.evaluated(metrics["eval_loss"])

    # --- what the objective brings along ------------------------------------------------------

    def objective_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the objective itself (a projection, learned weights)."""
        parameters = getattr(self.objective, "parameters", list)()
        return [each for each in parameters if each.requires_grad]

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **options)
        known = {id(each) for group in optimizer.param_groups for each in group["params"]}
        extra = [each for each in self.objective_parameters() if id(each) not in known]
        if extra:
            optimizer.add_param_group({"params": extra, "weight_decay": 0.0})
        return optimizer

    # --- logs and times -----------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if "loss" in logs:
            logs.update(self.statistics.summary())
        super().log(logs, *args, **options)

    @property
    def tokens(self) -> int:
        """Supervised tokens trained on so far, over all ranks."""
        return round(self.statistics.rows)

    def seconds(self) -> dict[str, float]:
        """Training time of the whole run, interruptions left out: `teacher`, `student` (forward
        and backward), `loss` (the output heads included), `rest` (optimiser, data) and `total`,
        without evaluation and checkpoints; where the student responds, `responses` too."""
        measured = self.clock.seconds()
        total, steps = measured.get("total", 0.0), measured.get("micro_steps", 0.0)
        teacher, loss = measured.get("teacher", 0.0), measured.get("loss", 0.0)
        parts = {"teacher": teacher, "student": steps - teacher - loss, "loss": loss}
        if self.on_policy is not None:
            parts["responses"] = measured.get("responses", 0.0)
        return {**parts, "rest": total - steps - parts.get("responses", 0.0), "total": total}

    # --- what a resumed run needs -------------------------------------------------------------

    def run_state(self) -> dict[str, Any]:
        state = {"statistics": self.statistics.state_dict(), "clock": self.clock.seconds()}
        for name in ("objective", "adaptive_share"):
            if hasattr(getattr(self, name), "state_dict"):
                state[name] = getattr(self, name).state_dict()
        return state

    def process_state(self) -> dict[str, Any]:
        # What is replayed is each process's own.
        return {} if self.on_policy is None else {"on_policy": self.on_policy.state_dict()}

    def load_run_state(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        for name, value in (state | own).items():
            if getattr(self, name) is not None:
                getattr(self, name).load_state_dict(value)


def _summary(prediction: Any) -> dict[str, float]:
    return summarize(prediction.predictions)
