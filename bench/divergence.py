"""The family of row divergences: student and teacher logits [N, V] to a loss and its gradient.

Forward and backward are timed together, in the two forms the ops have:
- `row`: one value a row and a fresh [N, V] gradient;
- `loss`: their mean; ours writes the gradient over the student's logits.
The floor is one `copy_` that moves the same bytes: two reads and one write of [N, V].
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from .grid import Cell, Provider
from .measure import seconds_of

NAME = "divergence"
KINDS = ("forward_kl", "jsd(0.5)")
FORMS = ("row", "loss")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAIN_SHAPE = (512, 49152)
SHAPES = (
    MAIN_SHAPE,
    (512, 1000),
    (512, 32000),
    (256, 151936),
    (65536, 49),
    (65536, 256),
    (32768, 1000),
)
# All buffers that rotate hold at least this much together, so that none is still in a cache when
# its turn comes again.
ROTATING_BYTES = 256 * 2**20


def grid() -> list[Cell]:
    """Every cell, the main shape first."""
    return [
        Cell(NAME, kind, form, dtype, rows, columns)
        for (rows, columns), kind, dtype, form in itertools.product(SHAPES, KINDS, DTYPES, FORMS)
    ]


# ---- what is measured ----
# The plain expressions compute what ours compute: log-probabilities and their mixture in float32,
# whatever the dtype of the logits, and finite wherever the divergence is.


def plain_forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each row, [N]."""
    log_q = F.log_softmax(student, -1, dtype=torch.float32)
    log_p = F.log_softmax(teacher, -1, dtype=torch.float32)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def plain_jsd(student: Tensor, teacher: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of each row, [N]."""
    log_q = F.log_softmax(student, -1, dtype=torch.float32)
    log_p = F.log_softmax(teacher, -1, dtype=torch.float32)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    from_p = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    from_q = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    return 0.5 * (from_p + from_q)


# The rough ones are the fastest plain expressions known for a cell, at the price of exactness: in
# bf16 a log-probability has two digits, and a mixture of probabilities is nan where both underflow.


def rough_forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each row, [N], in the dtype of the logits."""
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def rough_jsd(student: Tensor, teacher: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of each row, [N], in the dtype of the logits."""
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    from_p = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    from_q = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    return 0.5 * (from_p + from_q)


def rough_jsd_of_probabilities(student: Tensor, teacher: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of each row, [N], by way of the mixture of probabilities."""
    log_q = F.log_softmax(student, -1, dtype=torch.float32)
    log_p = F.log_softmax(teacher, -1, dtype=torch.float32)
    p, q = log_p.exp(), log_q.exp()
    log_m = (0.5 * (p + q)).log()
    return 0.5 * (p * (log_p - log_m)).sum(-1) + 0.5 * (q * (log_q - log_m)).sum(-1)


PLAIN = {"forward_kl": plain_forward_kl, "jsd(0.5)": plain_jsd}
ROUGH_EAGER = {"forward_kl": rough_forward_kl, "jsd(0.5)": rough_jsd}
# logaddexp is not vectorised by the compiler: probabilities are what it does best.
ROUGH_COMPILED = {"forward_kl": rough_forward_kl, "jsd(0.5)": rough_jsd_of_probabilities}


def build_eager(table: dict[str, Callable], cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
    """Eager torch."""
    rows = table[cell.kind]
    return rows if cell.form == "row" else lambda student, teacher: rows(student, teacher).mean()


def build_compiled(table: dict[str, Callable], cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
    """The same expression under torch.compile, for this one shape."""
    return torch.compile(build_eager(table, cell), fullgraph=True, dynamic=False)


def rough_eager_refuses(cell: Cell) -> str | None:
    """In float32 nothing is gained by being rough."""
    return "the same as eager in float32" if cell.dtype == "fp32" else None


def rough_compiled_refuses(cell: Cell) -> str | None:
    """The forward KL of float32 logits has no rougher form."""
    same = cell.dtype == "fp32" and cell.kind == "forward_kl"
    return "the same as torch.compile in float32" if same else None


def build_ours(cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
    """The fused op."""
    from stillhouse import ops

    kind = {"forward_kl": ops.ForwardKL(), "jsd(0.5)": ops.JSD(beta=0.5)}[cell.kind]
    if cell.form == "row":
        return partial(ops.divergence, kind=kind)
    return partial(ops.divergence_loss, kind=kind, inplace_grad=True)


def build_trl(cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
    """TRL's loss of its GKD trainer: generalized JSD, which at beta = 0 is the forward KL."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # it warns that its name may change
    from trl.experimental.gkd import GKDTrainer

    beta = {"forward_kl": 0.0, "jsd(0.5)": 0.5}[cell.kind]

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        total = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta)
        return total / len(student)  # "batchmean" has divided by the batch of one only

    return loss


def trl_refuses(cell: Cell) -> str | None:
    """TRL computes a mean, and has no row form."""
    if cell.form == "row":
        return "has no value for each row"
    return None if find_spec("trl") else "not installed (pip install trl)"


def liger_refuses(cell: Cell) -> str | None:
    """Liger's losses are Triton kernels."""
    return "its Triton kernels need a GPU" if not torch.cuda.is_available() else "not compared yet"


def _never_built(cell: Cell) -> Callable[[Tensor, Tensor], Tensor]:
    raise RuntimeError(f"{cell} was built although its provider refuses it")


OURS, FLOOR = "stillhouse", "floor"
PROVIDERS = (
    Provider(OURS, build_ours, in_place=True),
    Provider("eager", partial(build_eager, PLAIN)),
    Provider("rough eager", partial(build_eager, ROUGH_EAGER), refuses=rough_eager_refuses),
    Provider("torch.compile", partial(build_compiled, PLAIN), warms_whole=True),
    Provider(
        "rough torch.compile",
        partial(build_compiled, ROUGH_COMPILED),
        refuses=rough_compiled_refuses,
        warms_whole=True,
    ),
    Provider("trl", build_trl, refuses=trl_refuses),
    Provider("liger", _never_built, refuses=liger_refuses),
)


# ---- how it is run ----


class Produced(torch.autograd.Function):
    """Hands out a buffer as if a model had just produced it: no leaf, no view, wants a gradient.

    The gradient that comes back is put into `sink`, so that no accumulation into a leaf is timed.
    """

    @staticmethod
    def forward(ctx, leaf: Tensor, holder: list[Tensor], sink: list[Tensor]) -> Tensor:
        ctx.sink = sink
        return torch.empty(0, dtype=holder[0].dtype, device=holder[0].device).set_(holder[0])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None, None]:
        ctx.sink.append(gradient)
        return None, None, None


class Step:
    """One forward and backward of a provider's function on given buffers."""

    def __init__(self, provider: Provider, cell: Cell, device: str):
        self.function, self.device = provider.build(cell), device
        self.leaf = torch.zeros((), requires_grad=True, device=device)
        upstream = torch.full((cell.rows,), 1 / cell.rows, device=device)
        self.upstream = upstream if cell.form == "row" else None

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[float, list[Tensor]]:
        """Seconds taken, and the gradient (in a list), which the caller frees when it likes."""
        sink: list[Tensor] = []
        logits = Produced.apply(self.leaf, [student], sink)
        seconds, _ = seconds_of(
            lambda: self.function(logits, teacher).backward(self.upstream), self.device
        )
        return seconds, sink


def make_logits(cell: Cell, device: str) -> tuple[Tensor, Tensor]:
    """Student and teacher logits [N, V]: a peaked teacher, and a student near to it."""
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[cell.dtype]
    teacher = torch.randn(cell.rows, cell.columns, generator=generator).mul_(3)
    student = torch.randn(cell.rows, cell.columns, generator=generator).add_(teacher)
    return student.to(device, dtype), teacher.to(device, dtype)


def pair_bytes(cell: Cell) -> int:
    """Bytes of the student's and the teacher's logits together."""
    return 2 * cell.rows * cell.columns * DTYPES[cell.dtype].itemsize


class Buffers:
    """Rotating copies of the inputs, and of the source and destination of the floor's copy."""

    def __init__(self, cell: Cell, device: str):
        self.device = device
        self.student, teacher = make_logits(cell, device)
        count = max(3, math.ceil(ROTATING_BYTES / pair_bytes(cell)))
        self.students = [self.student.clone() for _ in range(count)]
        self.teachers = [teacher.clone() for _ in range(count)]
        # copy_ of 1.5 N V elements reads and writes as much as two reads and one write of [N, V].
        elements = 3 * cell.rows * cell.columns // 2
        count = max(2, math.ceil(ROTATING_BYTES / (3 * pair_bytes(cell) // 2)))
        # Written to once: a fresh page of zeros is the same page of memory for all of them.
        ones = partial(torch.ones, elements, dtype=teacher.dtype, device=device)
        self.sources = [ones() for _ in range(count)]
        self.targets = [ones() for _ in range(count)]

    def run_step(self, step: Step, restore: bool, number: int) -> float:
        """One timed call on the buffers whose turn it is."""
        index = number % len(self.students)
        seconds, _ = step(self.students[index], self.teachers[index])
        if restore:  # at once, so that the fresh copy has left the caches before its next turn
            self.students[index].copy_(self.student)
        return seconds

    def run_floor(self, number: int) -> float:
        """One timed copy of the same bytes."""
        index = number % len(self.sources)
        copy = partial(self.targets[index].copy_, self.sources[index])
        return seconds_of(copy, self.device)[0]


def runners(
    cell: Cell, providers: list[Provider], device: str
) -> dict[str, Callable[[int], float]]:
    """The functions to time at a cell: each provider that does not refuse it, and the floor."""
    torch.compiler.reset()  # no compiled code of another cell counts against the limit of variants
    buffers = Buffers(cell, device)
    found = {
        provider.name: partial(
            buffers.run_step,
            Step(provider, cell, device),
            provider.in_place and cell.form == "loss",
        )
        for provider in providers
        if provider.refuses(cell) is None
    }
    return found | {FLOOR: buffers.run_floor}


def memory_call(
    cell: Cell, name: str, threads: int, device: str
) -> tuple[Callable[[], object], int]:
    """For `measure.peak_memory`: the warmed-up call, and the bytes of its fresh gradient."""
    provider = next(provider for provider in PROVIDERS if provider.name == name)
    return warmed_up(provider, cell, threads, device)


def warmed_up(
    provider: Provider, cell: Cell, threads: int, device: str
) -> tuple[Callable[[], object], int]:
    """What `memory_call` returns, for one provider."""
    torch.set_num_threads(threads)
    step = Step(provider, cell, device)
    # A small shape loads code and starts threads, and leaves no pool for the real call to hide in.
    small = Cell(cell.family, cell.kind, cell.form, cell.dtype, rows=64, columns=64)
    warm = cell if provider.warms_whole else small
    (step if provider.warms_whole else Step(provider, small, device))(*make_logits(warm, device))
    student, teacher = make_logits(cell, device)
    in_place = provider.in_place and cell.form == "loss"
    return partial(step, student, teacher), 0 if in_place else pair_bytes(cell) // 2
