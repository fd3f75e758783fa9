"""The family of stored teachers: what reading one costs, and what writing one adds to its forward.

`decode`: every row of a capture from its file to the tensors that a `SparseTeacher` takes, on one
thread; the kind is how values are stored, the floor reads the same bytes. `capture`: the teacher of
`make distill`, in bfloat16, over sequences of 128 tokens, to rows that are ready to be written; the
floor is its forward to logits.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from .divergence import FLOOR, OURS
from .grid import Cell, Provider
from .measure import timed_calls
from .step import LENGTH, Job, refuses

NAME = "shards"
K, EXAMPLES = 64, 256
DECODE, CAPTURE = "decode", "capture"
VALUES = ("exact", "fp16", "bf16", "compact")


def grid() -> list[Cell]:
    """A capture of 32,768 rows in each kind of values, and batches of two sizes."""
    cells = [Cell(NAME, values, DECODE, "fp32", EXAMPLES * LENGTH, 49152) for values in VALUES]
    return cells + [Cell(NAME, "forward", CAPTURE, "bf16", rows, 49152) for rows in (1024, 4096)]


def row_bytes(cell: Cell) -> int:
    """Bytes of a row in a file."""
    return _schema(cell).row_bytes


def _schema(cell: Cell) -> object:
    from stillhouse.teachers.shard_format import Schema

    examples = cell.rows // LENGTH
    numbers = (cell.columns, K, 0, cell.kind, 1.0, LENGTH + 1, examples)
    return Schema(*numbers, *("" for _ in range(7)))


@cache
def _folder(cell: Cell) -> Path:
    """A capture of random logits; a few examples, again and again."""
    from stillhouse import ops
    from stillhouse.teachers import StoredRows
    from stillhouse.teachers.shard_format import Part, write_manifest
    from stillhouse.teachers.shards import write_shard

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    some = []
    for _ in range(4):
        logits = 3 * torch.randn(LENGTH, cell.columns, generator=generator)
        top = ops.SparseTeacher.from_logits(logits, k=K)
        some.append(StoredRows(top.ids, top.log_probs, top.log_rest))
    examples, schema = cell.rows // LENGTH, _schema(cell)
    part = Part(0, 0, examples, examples * LENGTH)
    write_shard(folder, schema, part, [some[i % len(some)] for i in range(examples)])
    write_manifest(folder, schema, [part])
    return folder


def _on_one_thread(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            call()
        finally:
            torch.set_num_threads(threads)

    return run


def build_ours(cell: Cell) -> Callable[[], None]:
    """Rows of every example, read and checked; or the largest columns of a batch."""
    from stillhouse import ops
    from stillhouse.teachers import TeacherShards
    from stillhouse.teachers.packing import pack_ids, pack_values

    if cell.form == DECODE:
        shards = TeacherShards(_folder(cell), verify=False)
        return _on_one_thread(lambda: [shards.rows(i) for i in range(len(shards))])
    job = Job(cell, "cpu")

    def capture() -> None:
        with torch.no_grad():
            logits = job.teacher(job.batch, job.index).logits
            top = ops.SparseTeacher.from_logits(logits, k=K)
        pack_ids(top.ids, cell.columns)
        pack_values(top.log_probs, "fp16")

    return capture


def build_floor(cell: Cell) -> Callable[[], None]:
    """The bytes of the file; or the teacher's logits."""
    if cell.form == DECODE:
        path = _folder(cell) / "shard-00000.safetensors"
        return lambda: path.read_bytes()
    job = Job(cell, "cpu")

    def forward() -> None:
        with torch.no_grad():
            _ = job.teacher(job.batch, job.index).logits

    return forward


def _needs_models(cell: Cell) -> str | None:
    return refuses(cell) if cell.form == CAPTURE else None


PROVIDERS = (Provider(OURS, build_ours, _needs_models),)


def runners(
    cell: Cell, providers: list[Provider], device: str
) -> dict[str, Callable[[int], float]]:
    """The functions to time at a cell, and the floor."""
    found = {p.name: p.build(cell) for p in providers if p.refuses(cell) is None}
    if _needs_models(cell) is None:
        found[FLOOR] = build_floor(cell)
    return timed_calls(found, device)


def memory_call(
    cell: Cell, name: str, threads: int, device: str
) -> tuple[Callable[[], object], int]:
    """For `measure.peak_memory`: the warmed-up call, and no gradient."""
    torch.set_num_threads(threads)
    call = build_ours(cell)
    call()
    return call, 0
