"""`stillhouse distill`: two models, text and a method in; a student, a report and plots out.

`python -m stillhouse.recipes.distill` is the job of `distill.yaml` beside this file.
"""

from __future__ import annotations

import copy
import functools
import shutil
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from stillhouse import data, ops
from stillhouse.errors import UsageError, exit_code
from stillhouse.methods.catalog import METHODS
from stillhouse.report import Report
from stillhouse.train import DivergenceObjective, Objective
from stillhouse.train.arguments import DistillArguments, help_text, parse
from stillhouse.train.checkpoints import checkpoints, is_complete, newest_complete, remove_torn

DEMONSTRATION = Path(__file__).with_name("distill.yaml")
KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "cross_entropy")


def main(argv: Sequence[str]) -> int:
    """The command line after `stillhouse distill`; returns the exit code."""
    words = list(argv)
    if {"--help-all", "--help", "-h"} & set(words):
        return exit_code(lambda: print(help_text(everything="--help-all" in words)))
    traceback_wanted = _take_debug(words)
    return exit_code(lambda: distill(*parse(words)), traceback_wanted=traceback_wanted)


def distill(arguments: DistillArguments, training: Any) -> Report:
    """Load and check, train, measure, save. Returns the report, which is also on disk.

    `training` is a `transformers.TrainingArguments`. Raises ValueError or FileNotFoundError before
    the first step for models, data and checkpoints that do not fit.
    """
    from transformers.utils import logging

    # Loaders draw a bar for each file; what is loaded is said in one line below.
    logging.disable_progress_bar()
    objective = build_objective(arguments)
    if arguments.teacher is None and getattr(objective, "needs_teacher", True):
        raise UsageError(f"--teacher is missing: {arguments.method} compares with one")
    _check_directory(arguments, training)
    job = _Job(arguments, training)
    with training.main_process_first(desc="checkpoints"):
        checkpoint = _starting_point(arguments, training)
    trainer = job.trainer(arguments.method, objective, training)
    untouched = job.evaluate(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    runs = [_Run(arguments.method, trainer, job.evaluate(trainer))]
    folder = job.save(trainer)
    if arguments.control:
        runs += job.controls(runs[0])
    report = Report(Path(training.output_dir).name, training.output_dir)
    if training.process_index == 0:
        _fill(report, job, runs, untouched, folder)
        report.save()
        print(f"student: {folder}\nload it: {_load_command(folder)}")
    return report


def build_objective(arguments: DistillArguments) -> Objective:
    """The objective that `--method` and its options name. Raises UsageError for unknown ones."""
    import yaml

    name, options = arguments.method, {}
    for pair in arguments.method_options:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"expected --method_options name=value, got {pair!r}")
        options[key] = yaml.safe_load(value)
    shared = {"temperature": arguments.temperature, "label_weight": arguments.label_weight}
    method = METHODS.get(name)
    if name not in KINDS and (method is None or method.objective is None):
        known = [each.id for each in METHODS.values() if each.objective] + list(KINDS)
        raise UsageError(f"no method {name!r} to distil with: expected {', '.join(known)}")
    try:
        if name in KINDS:
            return DivergenceObjective(replace(ops.as_kind(name), **options), **shared)
        # A method without one of the shared flags may be used as long as the flag is not.
        changed = {
            field.name: shared[field.name]
            for field in fields(DistillArguments)
            if field.name in shared and shared[field.name] != field.default
        }
        return getattr(method.load(), method.objective)(**options, **changed)
    except TypeError as error:
        raise UsageError(f"--method {name} does not take these options: {error}") from error


@dataclass
class _Run:
    """One finished training run."""

    name: str
    trainer: Any
    metrics: dict[str, float]

    def row(self) -> dict[str, object]:
        seconds = self.trainer.seconds()["total"]
        return {
            "model": self.name,
            "perplexity": self.metrics.get("perplexity"),
            "KL to teacher": self.metrics.get("forward_kl"),
            "acceptance": self.metrics.get("acceptance"),
            "steps": self.trainer.state.global_step,
            "tokens": int(self.trainer.tokens),
            "seconds": seconds,
            "tokens/s": self.trainer.tokens / seconds if seconds else None,
        }


class _Job:
    """What the runs of one command share: a teacher, a tokenizer, examples; and how a run goes."""

    def __init__(self, arguments: DistillArguments, training: Any):
        from stillhouse.train import models

        self.arguments, self.training = arguments, training
        teacher, student = map(_resolve, (arguments.teacher, arguments.student))
        self.student_name = student
        # Text is read before the models: a wrong path should not cost a minute of loading.
        records = data.read(arguments.data)
        other = None if arguments.eval_data is None else data.read(arguments.eval_data)
        self.teacher = None
        if teacher is not None:
            self.teacher = models.load_model(teacher, arguments.teacher_dtype)
        self._fresh = models.load_student(student, self.teacher, arguments.student_dtype)
        self.tokenizer = models.load_tokenizer(teacher or student)
        if self.teacher is not None:
            own = self.tokenizer
            if not student.startswith("layers:") and models.has_tokenizer(student):
                own = models.load_tokenizer(student)
            models.check_pair(self._fresh, self.teacher, own, self.tokenizer, arguments.vocab_size)
        else:
            models.check_vocabulary(self._fresh, self.tokenizer)
        models.check_length(self._fresh, self.teacher, arguments.max_length)
        self.train_set, self.eval_set = self._examples(records, other)
        if training.process_index == 0:
            self._announce()

    def _examples(self, records: Any, evaluation: Any) -> tuple[Any, Any]:
        """Training and held-out examples; `evaluation` None holds out some of `records`."""
        from stillhouse.train.examples import encode

        length = self.arguments.max_length
        if evaluation is not None:
            numbers, held = range(len(records)), range(len(evaluation))
        else:
            evaluation = records
            numbers, held = data.holdout(records, self.arguments.eval_share)
        train_set = encode(records, numbers, self.tokenizer, length)
        return train_set, encode(evaluation, held, self.tokenizer, length) if held else None

    def _announce(self) -> None:
        def size(model: Any) -> str:
            parameters = sum(each.numel() for each in model.parameters()) / 1e6
            return f"{parameters:.1f}M parameters, {str(model.dtype).removeprefix('torch.')}"

        if self.teacher is not None:
            print(f"teacher: {self.arguments.teacher} ({size(self.teacher)})")
        print(f"student: {self.arguments.student} ({size(self._fresh)})")
        held = f"{self.eval_set.targets:,} held out" if self.eval_set else "none held out"
        print(
            f"data: {self.arguments.data}, {self.train_set.targets:,} tokens to train on, {held}",
            flush=True,
        )

    def _student(self) -> Any:
        """The untouched student, anew for each run."""
        from stillhouse.train.models import load_student

        student, self._fresh = self._fresh, None
        if student is None:
            student = load_student(self.student_name, self.teacher, self.arguments.student_dtype)
        if self.arguments.lora_rank:
            from peft import LoraConfig, get_peft_model

            rank = self.arguments.lora_rank
            adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
            student = get_peft_model(student, adapter)
        return student

    def trainer(self, name: str, objective: Objective, training: Any) -> Any:
        """A trainer with a fresh student."""
        from transformers import set_seed

        from stillhouse.train.examples import collate
        from stillhouse.train.trainer import DistillTrainer

        set_seed(training.seed)  # adapters begin at random
        padding = self.tokenizer.pad_token_id
        return DistillTrainer(
            self._student(),
            training,
            objective=objective,
            teacher=self.teacher,
            vocab_size=self.arguments.vocab_size,
            name=name,
            train_dataset=self.train_set,
            eval_dataset=self.eval_set,
            processing_class=self.tokenizer,
            data_collator=functools.partial(collate, padding=0 if padding is None else padding),
        )

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

    def controls(self, run: _Run) -> list[_Run]:
        """Cross-entropy from the same start on the same batches, and once more for as many steps
        as fit into the seconds of `run` (its steps are cheaper: no teacher)."""
        from transformers.trainer_utils import IntervalStrategy, SaveStrategy

        results = []
        for name, label in (("same tokens", "control"), ("same seconds", "control_equal_seconds")):
            training = copy.copy(self.training)
            training.output_dir = str(Path(self.training.output_dir) / label)
            training.save_strategy = SaveStrategy.NO
            training.eval_strategy = IntervalStrategy.NO
            training.load_best_model_at_end = False
            training.max_steps = run.trainer.state.global_step
            if results:
                per_step = results[0].trainer.seconds()["total"] / training.max_steps
                training.max_steps = max(1, round(run.trainer.seconds()["total"] / per_step))
            objective = DivergenceObjective("cross_entropy")
            trainer = self.trainer(f"control ({name})", objective, training)
            trainer.train()
            results.append(_Run(f"control, {name}", trainer, self.evaluate(trainer)))
        return results

    def save(self, trainer: Any) -> Path:
        """The student as an ordinary `save_pretrained` folder, adapters merged."""
        folder = Path(self.training.output_dir) / "student"
        if self.arguments.lora_rank:
            if self.training.process_index == 0:
                merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
                merged.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
        else:
            trainer.save_model(str(folder))
        return folder


def _fill(
    report: Report, job: _Job, runs: list[_Run], untouched: dict[str, float], folder: Path
) -> None:
    """Everything that was measured, as values, tables and a plot."""
    student, controls = runs[0], runs[1:]
    rows = [run.row() for run in runs]
    teacher = {"perplexity": student.metrics.get("reference_perplexity")}
    start = {name: None for name in rows[0]} | {
        "model": "untouched student",
        "perplexity": untouched.get("perplexity"),
        "KL to teacher": untouched.get("forward_kl"),
        "acceptance": untouched.get("acceptance"),
    }
    table = [start, *rows]
    if teacher["perplexity"] is not None:
        table.insert(0, {name: None for name in start} | {"model": "teacher"} | teacher)
    report.table("held-out text", table)

    names = ("student", "control", "control_equal_seconds")
    perplexity = {"teacher": teacher["perplexity"], "untouched": untouched.get("perplexity")}
    perplexity |= {name: None for name in names}
    perplexity |= {name: row["perplexity"] for name, row in zip(names, rows, strict=False)}
    seconds = student.trainer.seconds()
    report.value("perplexity", perplexity)
    report.value("tokens", {n: row["tokens"] for n, row in zip(names, rows, strict=False)})
    report.value("steps", {n: row["steps"] for n, row in zip(names, rows, strict=False)})
    report.value("kl_to_teacher", rows[0]["KL to teacher"])
    report.value("acceptance", rows[0]["acceptance"])
    report.value("seconds", seconds)
    report.value("tokens_per_second", rows[0]["tokens/s"])
    report.table(
        f"where the time of {student.name} went",
        [
            {"part": part, "seconds": spent, "share": spent / max(seconds["total"], 1e-9)}
            for part, spent in seconds.items()
        ],
    )
    for control in controls if job.eval_set else []:
        report.claim(
            f"perplexity over that of {control.name}",
            student.metrics["perplexity"] / control.metrics["perplexity"],
            1.0,
            seeds=[job.training.seed],
            relation="<=",
        )
    history = {
        run.name: [entry for entry in run.trainer.state.log_history if "loss" in entry]
        for run in runs
    }
    report.curve(
        "loss",
        {name: [entry["step"] for entry in log] for name, log in history.items()},
        {name: [entry["loss"] for entry in log] for name, log in history.items()},
        ylabel="loss (nats a token)",
    )
    report.value("processes", job.training.world_size)
    report.value("configuration", _configuration(job))
    report.value("model", str(folder))
    report.value("load", _load_command(folder))
    report.value("generations", _generations(job, folder))


def _generations(job: _Job, folder: Path) -> list[dict[str, str]]:
    """How the saved student continues two held-out texts, greedily."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    result = []
    for example in (job.eval_set or job.train_set).examples[:2]:
        masked = int(example.loss_mask.argmax())
        # A conversation's prompt is what is masked; running text has none.
        prompt = example.input_ids[: masked or max(1, min(24, len(example.input_ids) // 2))]
        import torch

        ids = torch.tensor(prompt[None].astype("int64"))
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=job.tokenizer.pad_token_id,
        )[0, len(prompt) :]
        texts = {"prompt": job.tokenizer.decode(prompt), "student": job.tokenizer.decode(output)}
        print(f"\n>>> {texts['prompt']}\n{texts['student']}")
        result.append(texts)
    return result


def _configuration(job: _Job) -> dict[str, object]:
    """Our arguments, and those of the training that differ from the library's defaults."""
    chosen = job.training.to_sanitized_dict()
    defaults = {
        field.name: field.default for field in fields(job.training) if field.default is not MISSING
    }
    changed = {
        name: value
        for name, value in chosen.items()
        if name in defaults and value != defaults[name]
    }
    return asdict(job.arguments) | {"training": changed}


def _load_command(folder: Path) -> str:
    return (
        "python -c \"from transformers import pipeline; print(pipeline('text-generation', "
        f"{str(folder)!r})('The for statement')[0]['generated_text'])\""
    )


def _resolve(name: str | None) -> str | None:
    return str(data.smollm2()) if name == "smollm2" else name


def _check_directory(arguments: DistillArguments, training: Any) -> None:
    """Refuse to overwrite, or to resume from half a checkpoint, before anything loads."""
    chosen = training.resume_from_checkpoint
    if chosen is not None and not is_complete(chosen):
        raise UsageError(f"{chosen} is no complete checkpoint: --resume finds the newest one")
    found = checkpoints(training.output_dir)
    if found and chosen is None and not (arguments.resume or arguments.overwrite):
        raise UsageError(
            f"{training.output_dir} already holds {found[-1].name}: continue with --resume, start "
            "again with --overwrite, or name another --output_dir"
        )


def _starting_point(arguments: DistillArguments, training: Any) -> str | None:
    """The checkpoint to continue from; torn ones (--resume) or all (--overwrite) are deleted."""
    directory = training.output_dir
    if training.resume_from_checkpoint is not None:
        return training.resume_from_checkpoint
    if arguments.overwrite:
        for path in checkpoints(directory):
            shutil.rmtree(path)
    if not arguments.resume:
        return None
    for path in remove_torn(directory):
        print(f"removed {path}: it was not written to its end")
    newest = newest_complete(directory)
    if newest is None:
        print(f"no complete checkpoint in {directory} yet: starting at the first step")
        return None
    print(f"continuing from {newest}")
    return str(newest)


def _take_debug(words: list[str]) -> bool:
    """Take our `--debug` out of the words; with a value it is the Trainer's flag and stays."""
    wanted = False
    for position in reversed(range(len(words))):
        following = words[position + 1 : position + 2]
        if words[position] == "--debug" and (not following or following[0].startswith("--")):
            del words[position]
            wanted = True
    return wanted


if __name__ == "__main__":
    sys.exit(main(["--config", str(DEMONSTRATION), *sys.argv[1:]]))
