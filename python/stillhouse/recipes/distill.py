"""`stillhouse distill`: two models, text and a method in; a student, a report and plots out.

`python -m stillhouse.recipes.distill` is the job of `distill.yaml` beside this file.
"""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from stillhouse import ops
from stillhouse.errors import UsageError, exit_code
from stillhouse.methods.catalog import METHODS
from stillhouse.progress import Progress
from stillhouse.recipes.distill_job import Job, Run
from stillhouse.recipes.distill_report import fill, generations, load_command
from stillhouse.report import Report
from stillhouse.teachers import TeacherShards
from stillhouse.train import DivergenceObjective, Objective, OnPolicy, Replay, mixtures, quantized
from stillhouse.train.arguments import DistillArguments, help_text, parse
from stillhouse.train.checkpoints import (
    checkpoints,
    is_complete,
    is_foreign,
    newest_complete,
    remove_torn,
)

DEMONSTRATION = Path(__file__).with_name("distill.yaml")
# TAID is a method, and SupportKL needs a teacher that is known at some columns only.
KINDS = tuple(name for name in ops.KINDS if name not in ("taid", "support_kl"))


def main(argv: Sequence[str]) -> int:
    """The command line after `stillhouse distill`; returns the exit code."""
    words = list(argv)
    if {"--help-all", "--help", "-h"} & set(words):
        return exit_code(lambda: print(help_text(everything="--help-all" in words)))
    traceback_wanted = _take_debug(words)
    return exit_code(lambda: _run(*parse(words)), traceback_wanted=traceback_wanted)


def _run(arguments: DistillArguments, training: Any) -> None:
    import torch.distributed

    distill(arguments, training)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # A worker thread of Gloo that still holds tensors when the interpreter ends aborts the
        # process (pytorch#179291). Wrapped models hold the group, in cycles: they go first.
        gc.collect()
        torch.distributed.destroy_process_group()


def distill(arguments: DistillArguments, training: Any) -> Report:
    """Load and check, train, measure, save. Returns the report, which is also on disk.

    `training` is a `transformers.TrainingArguments`. Raises ValueError or FileNotFoundError before
    the first step for models, data and checkpoints that do not fit.
    """
    from transformers.utils import logging

    # Loaders draw a bar for each file; what is loaded is said in one line below.
    logging.disable_progress_bar()
    objective = build_objective(arguments)
    if getattr(objective, "needs_pairs", False):
        raise UsageError(
            f"--method {arguments.method} with these options learns from pairs of a preferred and "
            "another response, which --data has not: stillhouse.train.run_stages trains with them"
        )
    needs_teacher = getattr(objective, "needs_teacher", True)
    if arguments.teacher is arguments.teacher_shards is None and needs_teacher:
        raise UsageError(f"--teacher is missing: {arguments.method} compares with one")
    on_policy = build_on_policy(arguments, training)
    _check_student(arguments, training)
    _check_directory(arguments, training)
    shards = None
    if arguments.teacher_shards is None and arguments.teacher_tail != "bucket":
        raise UsageError("--teacher_tail is of --teacher_shards, which is missing")
    if arguments.teacher_shards is not None:
        shards = _stored_teacher(arguments, objective, verify=training.local_process_index == 0)
    job = Job(arguments, training, shards)
    with training.main_process_first(local=False, desc="checkpoints"):
        checkpoint = _starting_point(arguments, training)
    trainer = job.trainer(arguments.method, objective, training, on_policy)
    # A sharded model can only be prepared together with its optimiser.
    untouched = {} if trainer.is_fsdp_enabled else job.evaluate(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    runs = [Run.of(trainer, arguments.method, job.evaluate(trainer))]
    folder = job.save(trainer)
    del trainer  # its weights and its optimiser are not to lie beside the control's
    if arguments.control:
        runs += job.controls(runs[0])
    report = Report(Path(training.output_dir).name, training.output_dir)
    if training.process_index == 0:
        fill(report, job, runs, untouched, folder)
        report.save()  # what was measured is safe, whatever the student writes
        report.value("generations", generations(job, folder))
        report.save()
        print(f"student: {folder}\nload it: {load_command(folder)}")
    return report


def _stored_teacher(
    arguments: DistillArguments, objective: Objective, *, verify: bool
) -> TeacherShards:
    """The shards of `--teacher_shards`, if this objective can be trained with them."""
    if arguments.teacher is not None:
        raise UsageError("--teacher and --teacher_shards are two teachers: name one of them")
    if not getattr(objective, "needs_teacher", True):
        raise UsageError(
            f"--method {arguments.method} needs no teacher: leave --teacher_shards out"
        )
    tails, tail = getattr(objective, "sparse_tails", ()), arguments.teacher_tail
    if tail not in tails:
        known = f": it takes --teacher_tail {' or '.join(tails)}" if tails else ": it needs a model"
        raise UsageError(
            f"--method {arguments.method} cannot be trained from --teacher_shards with "
            f"--teacher_tail {tail}{known}"
        )
    shards = TeacherShards(arguments.teacher_shards, verify=verify, progress=Progress("rows"))
    if shards.schema.temperature != arguments.temperature:
        raise UsageError(
            f"{shards.folder} was captured at temperature {shards.schema.temperature:g}: train at "
            f"it, or capture again at {arguments.temperature:g} (--temperature)"
        )
    if shards.schema.draws > 0 and not getattr(objective, "takes_draws", False):
        raise UsageError(
            f"{shards.folder} has drawn columns, which --method {arguments.method} would take for "
            "the teacher: use forward_kl or soft_cross_entropy, or capture without --draws"
        )
    return shards


def build_objective(arguments: DistillArguments) -> Objective:
    """The objective that `--method` and its options name. Raises UsageError for unknown ones."""
    name, options = arguments.method, {}
    # A kind of its own for teachers that are known at some columns only.
    kinds = KINDS if arguments.teacher_shards is None else (*KINDS, "support_kl")
    for pair in arguments.method_options:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"expected --method_options name=value, got {pair!r}")
        options[key] = _option_value(key, value)
    shared = {"temperature": arguments.temperature, "label_weight": arguments.label_weight}
    method = METHODS.get(name)
    if name not in kinds and (method is None or method.objective is None):
        known = [each.id for each in METHODS.values() if each.objective] + list(kinds)
        raise UsageError(f"no method {name!r} to distil with: expected {', '.join(known)}")
    try:
        if name in kinds:
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


def build_on_policy(arguments: DistillArguments, training: Any) -> OnPolicy | None:
    """What `--on_policy` and the flags beside it ask for. Raises UsageError for what contradicts
    itself."""
    if not 0 <= arguments.on_policy <= 1:
        raise UsageError(f"--on_policy is a share in [0, 1], got {arguments.on_policy}")
    if not arguments.student_responds:
        if arguments.replay:
            raise UsageError(
                "--replay is of the student's responses: name their share, --on_policy"
            )
        return None
    if arguments.teacher_shards is not None:
        raise UsageError("--on_policy needs --teacher: shards know nothing of new responses")
    if arguments.on_policy_adapts and training.eval_strategy == "no":
        raise UsageError("--on_policy_adapts follows the evaluated loss: add --eval_strategy steps")
    capacity = arguments.replay or (1000 if arguments.on_policy_adapts else 0)
    return OnPolicy(
        arguments.on_policy,
        max_new_tokens=arguments.max_new_tokens,
        prompt_tokens=arguments.prompt_tokens,
        temperature=arguments.response_temperature,
        top_k=arguments.response_top_k,
        top_p=arguments.response_top_p,
        replay=Replay(capacity) if capacity else None,
        seed=training.seed,
    )


def _option_value(key: str, text: str) -> Any:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--method_options {key}={text} cannot be read: {error}") from error
    try:
        return float(value) if isinstance(value, str) else value  # to YAML, 5e-4 is a word
    except ValueError:
        return value


def _check_student(arguments: DistillArguments, training: Any) -> None:
    if arguments.lora_rank and arguments.trainable:
        raise UsageError("--lora_rank trains adapters alone: leave --trainable out")
    student = arguments.student
    has_bits = student.startswith("fdb:") or quantized.is_marked(student)
    if arguments.lora_rank and has_bits:
        raise UsageError(
            "--lora_rank has no adapters for weights of two bits: name parameters, --trainable"
        )
    if student.startswith("experts:") or mixtures.is_marked(student):
        if arguments.lora_rank:
            raise UsageError(
                "--lora_rank has no adapters for experts: name parameters, --trainable"
            )
        if training.gradient_checkpointing:
            raise UsageError(
                "--gradient_checkpointing runs a layer twice, and routers would draw other experts "
                "the second time: leave it out with a student that has experts"
            )


def _check_directory(arguments: DistillArguments, training: Any) -> None:
    """Refuse to overwrite, or to resume from half a checkpoint, before anything loads."""
    chosen = training.resume_from_checkpoint
    if chosen is not None and not is_complete(chosen):
        raise UsageError(f"{chosen} is no complete checkpoint: --resume finds the newest one")
    found = checkpoints(training.output_dir)
    if chosen is not None or (arguments.overwrite and not arguments.resume):
        return
    if arguments.resume:
        foreign = [path.name for path in found if is_foreign(path)]
        if foreign:
            raise UsageError(
                f"{training.output_dir} holds {foreign[-1]}, which another trainer wrote: it "
                "cannot be resumed here; name another --output_dir"
            )
        return
    student = Path(training.output_dir, "student")
    held = [path.name for path in (student, *found) if path.exists()]
    if held:
        raise UsageError(
            f"{training.output_dir} already holds {held[-1]}: continue with --resume, start "
            "again with --overwrite, or name another --output_dir"
        )


def _starting_point(arguments: DistillArguments, training: Any) -> str | None:
    """The checkpoint to continue from; torn ones (--resume) or all (--overwrite) are deleted."""
    directory = training.output_dir
    if training.resume_from_checkpoint is not None:
        return training.resume_from_checkpoint
    if arguments.overwrite and not arguments.resume:
        for path in checkpoints(directory):
            shutil.rmtree(path)
    if not arguments.resume:
        return None
    say = print if training.process_index == 0 else (lambda text: None)
    for path in remove_torn(directory):
        say(f"removed {path}: it was not written to its end")
    newest = newest_complete(directory)
    if newest is None:
        say(f"no complete checkpoint in {directory} yet: starting at the first step")
        return None
    say(f"continuing from {newest}")
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
