"""The family of training steps: forward, loss and backward of the job of `make distill`.

SmolLM2-135M in bfloat16 teaches six of its own layers, under autocast to bfloat16; `rows` are the
tokens of a batch, sequences of 128. Beside ours, whose loss works on hidden states and heads inside
the student's forward: the same with the logits of all rows, and their gradient in place. The floor
is the step without heads and loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor

from .divergence import FLOOR, OURS
from .grid import Cell, Provider
from .measure import seconds_of

NAME = "step"
LENGTH = 128
LAYERS = (0, 1, 2, 10, 20, 29)
ROWS = (512, 4096)


def grid() -> list[Cell]:
    """Two sizes of batch."""
    return [Cell(NAME, "forward_kl", "step", "bf16", rows, 49152) for rows in ROWS]


def refuses(cell: Cell) -> str | None:
    """The models come from a package of their own."""
    from stillhouse import data

    try:
        data.smollm2()
    except data.DataUnavailable as error:
        return str(error)
    return None


@cache
def _models(device: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    from stillhouse import data
    from stillhouse.nn.surgery import take_layers
    from stillhouse.train import models

    teacher = models.load_model(str(data.smollm2()), "bfloat16").to(device)
    student = take_layers(teacher, list(LAYERS)).float().requires_grad_(True).train()
    return student, teacher


@contextmanager
def _whole_logits() -> Iterator[None]:
    """Heads that cannot be taken apart."""
    from stillhouse.train.head import Head

    own, Head.linear = Head.linear, lambda self: None
    try:
        yield
    finally:
        Head.linear = own


class Job:
    """The models with a batch of random tokens."""

    def __init__(self, cell: Cell, device: str):
        from stillhouse.train import supervised_rows
        from stillhouse.train.forward import FrozenTeacher, RowForward

        self.device = device
        self.student, teacher = _models(device)
        self.teacher, self.forward = FrozenTeacher(teacher), RowForward(self.student)
        generator = torch.Generator().manual_seed(0)
        shape = (max(1, cell.rows // LENGTH), min(cell.rows, LENGTH))
        ids = torch.randint(0, cell.columns, shape, generator=generator).to(device)
        self.batch = {"input_ids": ids, "labels": ids}
        self.index = supervised_rows(ids)

    def step(self, loss_of: Callable) -> None:
        """`loss_of(student rows, teacher rows)` and its backward."""
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            target = self.teacher(self.batch, self.index)
            loss = self.forward(
                self.student,
                self.batch,
                self.index,
                lambda rows: {"loss": loss_of(rows, target)},
            )["loss"]
        loss.backward()

    def clear(self) -> None:
        """No gradients."""
        self.student.zero_grad(set_to_none=True)


def _divergence(rows: object, target: object) -> Tensor:
    from stillhouse.train import row_loss

    return row_loss(rows, target, "forward_kl", {})[0]


def _none(rows: object, target: object) -> Tensor:
    return rows.hidden.sum(dtype=torch.float32) + 0 * target.hidden.sum(dtype=torch.float32)


def build_ours(cell: Cell) -> Callable[[Job], None]:
    """Hidden states and heads."""
    return lambda job: job.step(_divergence)


def build_whole(cell: Cell) -> Callable[[Job], None]:
    """The logits of all rows."""

    def call(job: Job) -> None:
        with _whole_logits():
            job.step(_divergence)

    return call


PROVIDERS = (
    Provider(OURS, build_ours, refuses),
    Provider("whole logits", build_whole, refuses),
)


def _timed(job: Job, call: Callable[[Job], None]) -> float:
    seconds, _ = seconds_of(partial(call, job), job.device)
    job.clear()
    return seconds


def runners(
    cell: Cell, providers: list[Provider], device: str
) -> dict[str, Callable[[int], float]]:
    """The functions to time at a cell; none where the models are not installed."""
    job = Job(cell, device)
    found = {p.name: partial(lambda call, _: _timed(job, call), p.build(cell)) for p in providers}
    floor = partial(lambda call, _: _timed(job, call), lambda job: job.step(_none))
    return found | {FLOOR: floor}


def memory_call(
    cell: Cell, name: str, threads: int, device: str
) -> tuple[Callable[[], object], int]:
    """For `measure.peak_memory`: the warmed-up call, and the bytes of the gradients."""
    torch.set_num_threads(threads)
    provider = next(provider for provider in PROVIDERS if provider.name == name)
    call = provider.build(cell)
    small = Job(
        Cell(*(getattr(cell, n) for n in ("family", "kind", "form", "dtype")), 8, 64), device
    )
    call(small)
    small.clear()
    job = Job(cell, device)
    return partial(call, job), sum(4 * p.numel() for p in job.student.parameters())
