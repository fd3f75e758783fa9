"""What the training runs of one `stillhouse distill` share, and how each of them goes."""

from __future__ import annotations

import copy
import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from stillhouse import data
from stillhouse.errors import UsageError
from stillhouse.nn.fdb_surgery import freeze_fdb_, has_fdb
from stillhouse.nn.surgery import train_only
from stillhouse.teachers import ShardError, StoredExamples, StoredTeacher, TeacherShards
from stillhouse.train import (
    AdaptiveShare,
    DivergenceObjective,
    Objective,
    OnPolicy,
    mixtures,
    models,
    quantized,
)
from stillhouse.train.arguments import DistillArguments
from stillhouse.train.examples import collate, encode


@dataclass
class Run:
    """What is left of one finished training run: numbers."""

    name: str
    metrics: dict[str, float]
    steps: int
    tokens: int
    seconds: dict[str, float]  # as DistillTrainer.seconds
    history: list[dict[str, float]]  # the training entries of the trainer's log
    engine: str

    @classmethod
    def of(cls, trainer: Any, name: str, metrics: dict[str, float]) -> Run:
        state = trainer.state
        history = [entry for entry in state.log_history if "loss" in entry]
        numbers = metrics, state.global_step, trainer.tokens, trainer.seconds(), history
        return cls(name, *numbers, _engine(trainer))

    def row(self) -> dict[str, object]:
        seconds = self.seconds["total"]
        return {
            "model": self.name,
            "perplexity": self.metrics.get("perplexity"),
            "KL to teacher": self.metrics.get("forward_kl"),
            "acceptance": self.metrics.get("acceptance"),
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": seconds,
            "tokens/s": self.tokens / seconds if seconds else None,
        }


def _engine(trainer: Any) -> str:
    """What the training really ran on, whatever was asked for."""
    if any(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters()):
        return "FSDP2"
    if isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel):
        return "DDP"
    kind = trainer.accelerator.distributed_type.value
    return "one process" if kind == "NO" else kind


class Job:
    """What the runs of one command share: a teacher, a tokenizer, examples; and how a run goes."""

    def __init__(
        self, arguments: DistillArguments, training: Any, shards: TeacherShards | None = None
    ):
        self.arguments, self.training, self.shards = arguments, training, shards
        teacher, student = map(resolve, (arguments.teacher, arguments.student))
        self.student_name = student
        # Text is read before the models: a wrong path should not cost a minute of loading.
        records = data.read(arguments.data)
        other = None if arguments.eval_data is None else data.read(arguments.eval_data)
        self.teacher = None
        if teacher is not None:
            self.teacher = models.load_model(teacher, arguments.teacher_dtype)
        self._fresh = models.load_student(student, self.teacher, arguments.student_dtype)
        self.tokenizer = models.load_tokenizer(teacher or models.source_of(student))
        if shards is not None:
            self._check_stored(shards)
        if self.teacher is not None:
            own, named = self.tokenizer, models.dense_of(student)
            if not named.startswith("layers:") and models.has_tokenizer(named):
                own = models.load_tokenizer(named)
            models.check_pair(self._fresh, self.teacher, own, self.tokenizer, arguments.vocab_size)
        else:
            models.check_vocabulary(self._fresh, self.tokenizer, arguments.vocab_size)
        response = arguments.max_new_tokens if arguments.student_responds else 0
        models.check_length(self._fresh, self.teacher, arguments.max_length, response)
        numbers, held = split(arguments, records)
        if other is not None:
            held = range(len(other))
        of = functools.partial(encode, tokenizer=self.tokenizer, max_length=arguments.max_length)
        self.train_set = of(records, numbers)
        self.eval_set = of(records if other is None else other, held) if held else None
        self.stored_set = None if shards is None else StoredExamples(self.train_set, shards)
        if training.process_index == 0:
            self._announce()

    def _check_stored(self, shards: TeacherShards) -> None:
        """Raise ShardError where column j of the shards is not column j of the student."""
        shards.check(tokenizer=self.tokenizer)
        columns = self.arguments.vocab_size or models.head_width(self._fresh)
        if shards.schema.vocab_size != columns:
            raise ShardError(
                f"{shards.folder} has {shards.schema.vocab_size} columns, the student {columns}: "
                "if the surplus is padding, pass --vocab_size to both commands"
            )

    def _announce(self) -> None:
        def size(model: Any) -> str:
            parameters = sum(each.numel() for each in model.parameters()) / 1e6
            return f"{parameters:.1f}M parameters, {str(model.dtype).removeprefix('torch.')}"

        if self.teacher is not None:
            print(f"teacher: {self.arguments.teacher} ({size(self.teacher)})")
        if self.shards is not None:
            schema = self.shards.schema
            print(
                f"teacher: {self.shards.folder} (the top {schema.k} of {schema.teacher_name}, "
                f"{schema.values}, {self.shards.row_count:,} rows)"
            )
        print(f"student: {self.arguments.student} ({size(self._fresh)})")
        held = f"{self.eval_set.targets:,} held out" if self.eval_set else "none held out"
        print(
            f"data: {self.arguments.data}, {self.train_set.targets:,} tokens to train on, {held}",
            flush=True,
        )

    def _student(self) -> Any:
        """The untouched student, anew for each run."""
        student, self._fresh = self._fresh, None
        if student is None:
            student = models.load_student(
                self.student_name, self.teacher, self.arguments.student_dtype
            )
        if self.arguments.lora_rank:
            from peft import LoraConfig, get_peft_model

            rank = self.arguments.lora_rank
            adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
            student = get_peft_model(student, adapter)
        elif self.arguments.trainable:
            train_only(student, self.arguments.trainable)
        return student

    def trainer(
        self, name: str, objective: Objective, training: Any, on_policy: OnPolicy | None = None
    ) -> Any:
        """A trainer with a fresh student. Raises UsageError for adapters in shards."""
        from transformers import set_seed

        from stillhouse.train.trainer import DistillTrainer

        set_seed(training.seed)  # adapters begin at random
        if hasattr(objective, "use_tokenizer"):
            objective.use_tokenizer(self.tokenizer)
        padding = self.tokenizer.pad_token_id
        teacher, examples = self.teacher, self.train_set
        if self.shards is not None and getattr(objective, "needs_teacher", True):
            teacher = StoredTeacher(self.shards, self.arguments.teacher_tail)
            examples = self.stored_set
        trainer = DistillTrainer(
            self._student(),
            training,
            objective=objective,
            teacher=teacher,
            vocab_size=self.arguments.vocab_size,
            on_policy=on_policy,
            adaptive_share=(
                AdaptiveShare(on_policy) if on_policy and self.arguments.on_policy_adapts else None
            ),
            name=name,
            train_dataset=examples,
            eval_dataset=self.eval_set,
            processing_class=self.tokenizer,
            data_collator=functools.partial(collate, padding=0 if padding is None else padding),
        )
        if trainer.is_fsdp_enabled and mixtures.has_mixtures(trainer.model):
            raise UsageError("--student experts:... with FSDP: its shards are not saved; use DDP")
        if trainer.is_fsdp_enabled and has_fdb(trainer.model):
            raise UsageError("--student fdb:... with FSDP: its shards are not saved; use DDP")
        if trainer.is_fsdp_enabled and self.arguments.lora_rank:
            raise UsageError("--lora_rank with FSDP: shards of adapters are not merged; use DDP")
        return trainer

    def evaluate(self, trainer: Any) -> dict[str, float]:
        """Metrics on the held-out text, without their prefix; empty where nothing is held out."""
        if self.eval_set is None:
            return {}
        state = trainer.state
        metrics = next((log for log in reversed(state.log_history) if "eval_loss" in log), None)
        # The last evaluation during training stands, unless an earlier model was put back.
        if (
            metrics is None
            or metrics["step"] != state.global_step
            or self.training.load_best_model_at_end
        ):
            metrics = trainer.evaluate()
        return {name.removeprefix("eval_"): value for name, value in metrics.items()}

    def controls(self, run: Run) -> list[Run]:
        """Cross-entropy from the same start on the same batches, and once more for as many steps
        as fit into the seconds of `run` (its steps are cheaper: no teacher)."""
        from accelerate.utils import broadcast_object_list
        from transformers.trainer_utils import IntervalStrategy, SaveStrategy

        results = []
        for name, label in (("same tokens", "control"), ("same seconds", "control_equal_seconds")):
            training = copy.copy(self.training)
            training.output_dir = str(Path(self.training.output_dir) / label)
            training.save_strategy = SaveStrategy.NO
            training.eval_strategy = IntervalStrategy.NO
            training.load_best_model_at_end = False
            training.max_steps = run.steps
            if results:
                per_step = results[0].seconds["total"] / run.steps
                steps = [max(1, round(run.seconds["total"] / per_step))]
                # One number for all processes: each has its own clock.
                training.max_steps = broadcast_object_list(steps)[0]
            objective = DivergenceObjective("cross_entropy")
            trainer = self.trainer(f"control ({name})", objective, training)
            trainer.train()
            results.append(Run.of(trainer, f"control, {name}", self.evaluate(trainer)))
        return results

    def save(self, trainer: Any) -> Path:
        """The student as an ordinary `save_pretrained` folder, adapters merged, or a marked one."""
        trainer.require_finite_weights()
        freeze_fdb_(trainer.accelerator.unwrap_model(trainer.model))
        folder = Path(self.training.output_dir) / "student"
        partial = folder.with_name("student.partial")
        if self.training.process_index == 0:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
        trainer.accelerator.wait_for_everyone()
        if self.arguments.lora_rank:
            if self.training.process_index == 0:
                merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
                merged.save_pretrained(partial)
                self.tokenizer.save_pretrained(partial)
        else:
            trainer.save_model(str(partial))
        if self.training.process_index == 0:
            if mixtures.has_mixtures(trainer.model):
                mixtures.mark(partial)
            if has_fdb(trainer.model):
                quantized.mark(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        trainer.accelerator.wait_for_everyone()
        return folder


def split(arguments: Any, records: Any) -> tuple[Any, Any]:
    """Numbers of the records to train on, and of those that are held out; with --eval-data none."""
    if arguments.eval_data is not None:
        return range(len(records)), ()
    return data.holdout(records, arguments.eval_share)


def resolve(name: str | None) -> str | None:
    """The place of a model: the word smollm2, also after an @, is the installed package."""
    before, at, model = (name or "").rpartition("@")
    return f"{before}{at}{data.smollm2()}" if model == "smollm2" else name
