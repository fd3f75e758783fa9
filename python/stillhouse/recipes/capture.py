"""`stillhouse capture`: what a teacher says at every supervised row of a data set, into shards.

Each shard's content depends on its own examples alone, so several processes share the work without
a word between them, and a capture that was killed goes on where it was.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stillhouse import data, ops
from stillhouse.errors import UsageError
from stillhouse.progress import Progress
from stillhouse.recipes.distill_job import resolve, split
from stillhouse.report import Report
from stillhouse.teachers import fingerprints, packing
from stillhouse.teachers.shard_format import (
    MANIFEST,
    ForeignShard,
    Part,
    Schema,
    ShardError,
    read_manifest,
    write_manifest,
)
from stillhouse.teachers.shards import ShardFiles, StoredRows, TeacherShards, write_shard

# Rows whose logits exist at a time.
ROWS = 512


@dataclass
class CaptureArguments:
    """As the flags of the command line; what `stillhouse distill` has as well means the same."""

    teacher: str
    data: str
    out: str
    top_k: int = 64
    draws: int = 0
    values: str = "fp16"
    temperature: float = 1.0
    teacher_dtype: str = "auto"
    max_length: int = 512
    eval_data: str | None = None
    eval_share: float = 0.05
    vocab_size: int | None = None
    batch_size: int = 8
    shard_rows: int = 1 << 16
    part: str | None = None
    overwrite: bool = False


def capture(arguments: CaptureArguments) -> Report | None:
    """Write the shards of this process, and the manifest where they were the last ones.

    Returns the report of the process that has written the manifest, else None. Raises UsageError
    for flags, ShardError for a folder that holds something else, ValueError and FileNotFoundError
    for models and data that do not fit.
    """
    place, processes = _place(arguments.part)
    _check(arguments)
    job = _Job(arguments)
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    parts = None if arguments.overwrite else _captured(folder, job.schema)
    files = ShardFiles(folder, job.schema, parts or job.plan())
    ours = files.parts[place::processes]
    others = sorted(set(files.parts) - set(ours))
    if processes > 1:
        who = f"process {place + 1} of {processes}"
        print(f"{who}: {len(ours)} of {len(files.parts)} shards", flush=True)
    if arguments.overwrite:
        _clear(folder, ours, len(files.parts) if place == 0 else None)
    missing = _missing(files, ours)
    if missing:
        (folder / MANIFEST).unlink(missing_ok=True)  # of a folder that is no longer whole
        if len(missing) < len(ours):
            print(f"{len(ours) - len(missing)} finished shards are kept", flush=True)
        job.run(folder, missing)
    # The last process reads what the others have written; before that headers are enough.
    replaced = arguments.overwrite
    waiting = _missing(files, others, foreign_too=replaced, verify=False)
    waiting = waiting or _missing(files, others, foreign_too=replaced)
    if waiting:
        print(f"done; {len(waiting)} shards of other processes are not there yet", flush=True)
        return None
    for left in folder.glob("shard-*.partial-*"):  # by what was killed
        left.unlink(missing_ok=True)
    if (folder / MANIFEST).exists() or not write_manifest(folder, job.schema, files.parts):
        print(f"{folder} is captured: {files.row_count:,} rows in {len(files.parts)} shards")
        return None
    return job.report(folder)


def _place(part: str | None) -> tuple[int, int]:
    """This process among all of them: of `--part 2/4`, or of torchrun's environment."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if part is None:
        return int(os.environ.get("RANK", 0)), started
    if started > 1:
        raise UsageError(f"--part {part} and {started} processes of torchrun: use one of them")
    number, slash, count = part.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise UsageError(f"expected --part 1/4 to --part 4/4, got {part!r}")
    return int(number) - 1, int(count)


def _check(arguments: CaptureArguments) -> None:
    if arguments.values not in packing.VALUES:
        known = ", ".join(packing.VALUES)
        raise UsageError(f"--values must be one of {known}, got {arguments.values!r}")
    for name in ("top_k", "batch_size", "shard_rows"):
        if getattr(arguments, name) < 1:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} must be at least 1, got {getattr(arguments, name)}")
    if not 0 <= arguments.draws < arguments.top_k:
        raise UsageError(
            f"--draws {arguments.draws} are taken out of --top-k {arguments.top_k}: fewer are left"
        )
    if not 0 < arguments.temperature < float("inf"):
        raise UsageError(f"--temperature must be positive, got {arguments.temperature}")


def _captured(folder: Path, schema: Schema) -> list[Part] | None:
    """The shards of a capture of the same that was finished here, if one was. Raises ShardError
    for another one."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        found, parts = read_manifest(path)
    except ShardError as error:
        raise ShardError(f"{error}; delete it, and the capture goes on with its shards") from error
    if found != schema:
        raise ShardError(f"{folder} holds another capture: --overwrite replaces it")
    return parts


def _clear(folder: Path, ours: Sequence[Part], beyond: int | None) -> None:
    """Delete the shards of this process and those numbered from `beyond` on; the manifest before,
    since half a folder must not look like a whole one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for part in ours:
        (folder / part.name).unlink(missing_ok=True)
    for path in folder.glob("shard-*.safetensors*") if beyond is not None else ():
        number = path.name.removeprefix("shard-").partition(".")[0]
        if number.isdigit() and int(number) >= beyond:
            path.unlink()


def _missing(
    files: ShardFiles, parts: Sequence[Part], *, foreign_too: bool = False, verify: bool = True
) -> list[Part]:
    """Shards that are not there whole. Raises ShardError for one that is of another capture."""
    missing, done, progress = [], 0, Progress("rows")
    total = sum(part.rows for part in parts)
    for part in parts:
        try:
            files.check_file(part)
            if verify:
                files.verify(part)
        except ForeignShard as error:
            if not foreign_too:
                raise ShardError(f"{error} (--overwrite replaces what is there)") from error
            missing.append(part)
        except ShardError:
            missing.append(part)
        done += part.rows
        progress(f"checking {part.name}", done, total)
    return missing


class _Job:
    """The teacher, the examples, and what is to be written of them."""

    def __init__(self, arguments: CaptureArguments):
        from transformers.utils import logging

        from stillhouse.train import models
        from stillhouse.train.examples import encode
        from stillhouse.train.forward import FrozenTeacher

        logging.disable_progress_bar()
        self.arguments = arguments
        records = data.read(arguments.data)
        name = resolve(arguments.teacher)
        self.tokenizer = models.load_tokenizer(name)
        model = models.load_model(name, arguments.teacher_dtype)
        models.check_vocabulary(model, self.tokenizer, arguments.vocab_size)
        models.check_length(None, model, arguments.max_length)
        self.columns = arguments.vocab_size or models.head_width(model)
        if arguments.top_k > self.columns:
            raise UsageError(f"--top-k {arguments.top_k} is more than {self.columns} columns")
        numbers, _ = split(arguments, records)
        self.examples = encode(records, numbers, self.tokenizer, arguments.max_length).examples
        self.schema = Schema(
            vocab_size=self.columns,
            k=arguments.top_k,
            draws=arguments.draws,
            values=arguments.values,
            temperature=float(arguments.temperature),
            max_length=arguments.max_length,
            examples=len(self.examples),
            data=fingerprints.of_examples(self.examples),
            tokenizer=fingerprints.of_tokenizer(self.tokenizer),
            teacher=fingerprints.of_model(model),
            teacher_name=arguments.teacher,
            teacher_dtype=str(model.dtype).removeprefix("torch."),
            stillhouse=importlib.metadata.version("stillhouse"),
            torch=torch.__version__,
        )
        self.device = torch.device("cpu")
        if torch.accelerator.is_available():
            # Each process of torchrun has one of its machine's.
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
            self.device = torch.accelerator.current_accelerator()
        self.teacher = FrozenTeacher(model.to(self.device))
        self.counts = [int(each.loss_mask[1:].sum()) for each in self.examples]
        self.seconds = {"forward": 0.0, "selection": 0.0, "writing": 0.0}
        self.largest = arguments.top_k - arguments.draws
        self.rows, self.mass = 0, torch.zeros(self.largest, dtype=torch.float64)

    def plan(self) -> list[Part]:
        """Examples in their order, a shard being full with the example that reaches its size."""
        parts, first, rows = [], 0, 0
        for number, count in enumerate(self.counts, 1):
            rows += count
            if rows >= self.arguments.shard_rows or number == len(self.counts):
                parts.append(Part(len(parts), first, number, rows))
                first, rows = number, 0
        return parts

    def run(self, folder: Path, parts: Sequence[Part]) -> None:
        """Capture these shards, one after the other, with a line of progress now and then."""
        total, progress = sum(part.rows for part in parts), Progress("rows")
        for part in parts:
            stored: list[StoredRows] = []
            for start in range(part.first, part.last, self.arguments.batch_size):
                stored += self._batch(start, min(start + self.arguments.batch_size, part.last))
                progress(part.name, self.rows, total)
            since = time.perf_counter()
            write_shard(folder, self.schema, part, stored)
            self.seconds["writing"] += time.perf_counter() - since

    @torch.no_grad()
    def _batch(self, first: int, last: int) -> list[StoredRows]:
        from stillhouse.train.examples import collate
        from stillhouse.train.rows import supervised_rows

        counts = self.counts[first:last]
        if sum(counts) == 0:
            columns = torch.empty(0, self.arguments.top_k)
            return [StoredRows(columns.int(), columns, torch.empty(0))] * len(counts)
        since = time.perf_counter()
        batch = collate(self.examples[first:last], padding=self.tokenizer.pad_token_id or 0)
        batch = {name: each.to(self.device) for name, each in batch.items()}
        rows = self.teacher(batch, supervised_rows(batch["labels"]))
        # Draws depend on the examples alone, too.
        generator, parts = torch.Generator().manual_seed(first), []
        for start in range(0, len(rows), ROWS):
            logits = rows.part(slice(start, start + ROWS)).logits[:, : self.columns]
            since = self._spent("forward", since)
            top = ops.SparseTeacher.from_logits(
                logits,
                k=self.largest,
                draws=self.arguments.draws,
                temperature=self.arguments.temperature,
                generator=generator,
            )
            parts.append([each.cpu() for each in (top.ids, top.log_probs, top.log_rest)])
            since = self._spent("selection", since)
        ids, log_probs, log_rest = (torch.cat(each) for each in zip(*parts, strict=True))
        if log_probs.isnan().any():
            row = int(log_probs.isnan().any(-1).nonzero()[0])
            record = self.examples[first + int(rows.index.sequence[row])].record
            raise ValueError(f"the teacher's logits at record {record} of the data are not finite")
        # A column without probability is as good as one that is not known.
        ids = torch.where(log_probs > -torch.inf, ids, -1)
        self.rows += len(ids)
        self.mass += log_probs[:, : self.largest].double().exp().cumsum(-1).sum(0)
        by_example = [each.split(counts) for each in (ids, log_probs, log_rest)]
        self._spent("selection", since)
        return [StoredRows(*each) for each in zip(*by_example, strict=True)]

    def _spent(self, on: str, since: float) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.seconds[on] += now - since
        return now

    def report(self, folder: Path) -> Report:
        """What was stored and what it cost; of the rows of this process, in this run."""
        shards = TeacherShards(folder, verify=False)
        size = sum((folder / part.name).stat().st_size for part in shards.parts)
        report = Report("capture", folder)
        report.value("rows", shards.row_count)
        report.value("shards", len(shards.parts))
        report.value("bytes", size)
        report.value("bytes_per_row", size / shards.row_count)
        report.value("schema", vars(self.schema))
        if self.rows:
            spent = sum(self.seconds.values())
            report.value("seconds", self.seconds)
            report.value("rows_per_second", self.rows / spent)
            report.value("over_bare_forward", spent / self.seconds["forward"])
            kept = (self.mass / self.rows).tolist()
            report.curve(
                "mass",
                list(range(1, len(kept) + 1)),
                {self.arguments.teacher: kept},
                xlabel="columns that are kept",
                ylabel="mean mass of the teacher in them",
            )
            report.table(
                "what the kept columns hold",
                [
                    {"columns": k, "mean mass": kept[k - 1]}
                    for k in sorted({1, 4, 16, len(kept)})
                    if k <= len(kept)
                ],
            )
        report.save()
        print(f"train from it: stillhouse distill --teacher-shards {folder} …")
        return report
