"""The family of linear divergences: hidden states and heads to a loss and its gradients.

Forward and backward are timed together, in the forms `loss` and `row`, with a head that is
trained or, in `loss frozen` and `row frozen`, not. `columns` is the vocabulary; both sides have
hidden states of 576. The floor is the matrix products that the loss form cannot do without: logits
of both sides, into memory that is there already, the gradient of the hidden states, and that of the
head where it is trained, as fresh tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .divergence import DTYPES, FLOOR, KINDS, OURS, PLAIN
from .grid import Cell, Provider
from .measure import seconds_of

NAME = "linear"
FORMS = ("loss", "row", "loss frozen", "row frozen")
WIDTH = 576
SHAPES = ((256, 49152), (1024, 49152), (4096, 49152))


def grid() -> list[Cell]:
    """Every cell."""
    return [
        Cell(NAME, kind, form, dtype, rows, columns)
        for (rows, columns), kind, dtype, form in itertools.product(SHAPES, KINDS, DTYPES, FORMS)
    ]


class Inputs:
    """Hidden states and heads; the student's want gradients as the form says."""

    def __init__(self, cell: Cell, device: str):
        generator, dtype = torch.Generator().manual_seed(0), DTYPES[cell.dtype]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        teacher = normal(cell.rows, WIDTH)
        weight = 3 / WIDTH**0.5 * normal(cell.columns, WIDTH)
        self.teacher_hidden, self.teacher_weight = (x.to(device, dtype) for x in (teacher, weight))
        self.hidden = (teacher + 0.3 * normal(*teacher.shape)).to(device, dtype).requires_grad_()
        self.weight = (weight + 0.01 * normal(*weight.shape)).to(device, dtype)
        self.weight.requires_grad_("frozen" not in cell.form)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight) if x.requires_grad]


Function = Callable[[Inputs], Tensor]


def build_ours(cell: Cell) -> Function:
    """The fused op."""
    from stillhouse import ops

    kind = {"forward_kl": ops.ForwardKL(), "jsd(0.5)": ops.JSD(beta=0.5)}[cell.kind]
    op = ops.linear_divergence if "row" in cell.form else ops.linear_divergence_loss

    def call(x: Inputs) -> Tensor:
        teacher = ops.LinearTeacher(x.teacher_hidden, x.teacher_weight)
        return op(x.hidden, x.weight, teacher, kind)

    return call


def _plain(cell: Cell) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    rows = PLAIN[cell.kind]

    def call(hidden: Tensor, weight: Tensor, other: Tensor, head: Tensor) -> Tensor:
        value = rows(F.linear(hidden, weight), F.linear(other, head))
        return value if "row" in cell.form else value.mean()

    return call


def _spread(function: Callable[..., Tensor]) -> Function:
    return lambda x: function(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight)


def build_eager(cell: Cell) -> Function:
    """Eager torch on whole logits."""
    return _spread(_plain(cell))


def build_compiled(cell: Cell) -> Function:
    """The same expression, products included, under torch.compile for this one shape."""
    return _spread(torch.compile(_plain(cell), fullgraph=True, dynamic=False))


PROVIDERS = (
    Provider(OURS, build_ours),
    Provider("eager", build_eager),
    Provider("torch.compile", build_compiled, warms_whole=True),
)


class Step:
    """One forward and backward of a provider's function."""

    def __init__(self, provider: Provider, cell: Cell, device: str):
        self.function, self.device = provider.build(cell), device
        upstream = torch.full((cell.rows,), 1 / cell.rows, device=device)
        self.upstream = upstream if "row" in cell.form else None

    def __call__(self, inputs: Inputs) -> float:
        """Seconds taken; the gradients are freed afterwards."""
        seconds, _ = seconds_of(lambda: self.function(inputs).backward(self.upstream), self.device)
        for leaf in inputs.leaves:
            leaf.grad = None
        return seconds


class Products:
    """The floor."""

    def __init__(self, cell: Cell, inputs: Inputs, device: str):
        self.inputs, self.device = inputs, device
        make = partial(torch.ones, dtype=inputs.hidden.dtype, device=device)
        self.student = make(cell.rows, cell.columns)
        self.teacher = make(cell.rows, cell.columns)

    @torch.no_grad()
    def products(self) -> None:
        x = self.inputs
        torch.mm(x.hidden, x.weight.t(), out=self.student)
        torch.mm(x.teacher_hidden, x.teacher_weight.t(), out=self.teacher)
        gradients = [torch.mm(self.student, x.weight)]
        if x.weight.requires_grad:
            gradients.append(torch.mm(self.student.t(), x.hidden))

    def __call__(self, number: int) -> float:
        return seconds_of(self.products, self.device)[0]


def runners(
    cell: Cell, providers: list[Provider], device: str
) -> dict[str, Callable[[int], float]]:
    """The functions to time at a cell: each provider that does not refuse it, and the floor."""
    torch.compiler.reset()
    inputs = Inputs(cell, device)
    found: dict[str, Callable[[int], float]] = {}
    for provider in providers:
        if provider.refuses(cell) is None:
            step = Step(provider, cell, device)
            found[provider.name] = lambda number, step=step: step(inputs)
    return found | {FLOOR: Products(cell, inputs, device)}


def memory_call(
    cell: Cell, name: str, threads: int, device: str
) -> tuple[Callable[[], object], int]:
    """For `measure.peak_memory`: the warmed-up call, and the bytes of its gradients."""
    provider = next(provider for provider in PROVIDERS if provider.name == name)
    torch.set_num_threads(threads)
    small = Cell(NAME, cell.kind, cell.form, cell.dtype, rows=64, columns=64)
    step = Step(provider, cell, device)
    if provider.warms_whole:
        step(Inputs(cell, device))
    else:
        Step(provider, small, device)(Inputs(small, device))
    inputs = Inputs(cell, device)
    return partial(step, inputs), sum(x.numel() * x.itemsize for x in inputs.leaves)
