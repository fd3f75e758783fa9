"""The family of entropic transport, 20 iterations each.

`small`: 256 problems of 32 x 32 costs, forward and backward; the kind is the gradient, with the
fitting mode of POT's batch solver and, for "unrolled", the loop of divisions by row and column sums
through autograd. `points`: 256 pairs of clouds of 32 points, against GeomLoss. `large`: one problem
in the logarithmic domain, forward alone, against POT. The floor of `large` is, for each iteration,
one read of the costs and as many exponentials in cache; that of the others a read of the costs or
points and a write of their gradient.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from .divergence import OURS
from .grid import Cell, Provider

NAME = "transport"
SMALL, POINTS, LARGE = "small", "points", "large"
EPSILON, ITERATIONS, DIMENSION = 0.1, 20, 16
GROUPS, SIZE = 256, 32
# All providers run on torch's own pool. To wake it takes up to half a millisecond, as much as a
# short call: as in a training step, one call follows the other.
PAUSE_SECONDS = 0.0


def grid() -> list[Cell]:
    """Every cell; rows are those of all problems, columns those of one."""
    small = [
        Cell(NAME, kind, SMALL, "fp32", GROUPS * SIZE, SIZE)
        for kind in ("unrolled", "implicit", "envelope")
    ]
    points = [Cell(NAME, "envelope", POINTS, "fp32", GROUPS * SIZE, SIZE)]
    large = [Cell(NAME, "forward", LARGE, "fp32", size, size) for size in (1024, 4096)]
    return [*small, *points, *large]


@cache
def _inputs(cell: Cell) -> tuple[Tensor, ...]:
    """On the default device, which is the one to measure."""
    generator = torch.Generator().manual_seed(0)
    shape, count = (cell.rows // cell.columns, cell.columns, cell.columns), 1
    if cell.form == POINTS:
        shape, count = (GROUPS, SIZE, DIMENSION), 2
    drawn = (torch.rand(shape, generator=generator, device="cpu") for _ in range(count))
    scale = 1 if cell.form == POINTS else 2
    return tuple((scale * x).to(torch.get_default_device()) for x in drawn)


def _with_backward(cell: Cell, value: Callable[..., Tensor]) -> Callable[[], None]:
    """Once forward and once backward, of the first input."""
    first, *rest = _inputs(cell)
    leaf = first.clone().requires_grad_()

    def call() -> None:
        leaf.grad = None
        value(leaf, *rest).sum().backward()

    return call


def build_ours(cell: Cell) -> Callable[[], None]:
    """`ops.sinkhorn`, or `ops.sinkhorn_points`."""
    from stillhouse import ops

    if cell.form == LARGE:
        (cost,) = _inputs(cell)
        mass = torch.full((1, cell.columns), 1 / cell.columns)
        options = dict(a=mass, b=mass, iterations=ITERATIONS, domain="log", return_plan=False)

        def forward() -> None:
            with torch.no_grad():
                ops.sinkhorn(cost, EPSILON, **options)

        return forward
    options = dict(iterations=ITERATIONS, gradient=cell.kind)
    options["value"] = "entropic" if cell.kind == "envelope" else "transport"
    if cell.form == POINTS:
        op = partial(ops.sinkhorn_points, epsilon=EPSILON, cost="euclidean", **options)
        return _with_backward(cell, lambda x, y: op(x, y).value)
    op = partial(ops.sinkhorn, epsilon=EPSILON, return_plan=False, **options)
    return _with_backward(cell, lambda cost: op(cost).value)


def build_loop(cell: Cell) -> Callable[[], None]:
    """Twenty divisions by row and column sums, differentiated by autograd."""

    def value(cost: Tensor) -> Tensor:
        plan = torch.exp(-cost / EPSILON)
        for _ in range(ITERATIONS):
            plan = plan / plan.sum(2, keepdim=True)
            plan = plan / plan.sum(1, keepdim=True)
        return (plan * cost).sum((1, 2))

    return _with_backward(cell, value)


def build_pot(cell: Cell, mode: str) -> Callable[[], None]:
    """POT's batch solver with a gradient mode of its own; of one large problem `sinkhorn_log`."""
    import ot
    from ot.batch import solve_batch

    if cell.form == LARGE:
        (cost,) = _inputs(cell)
        mass = torch.full((cell.columns,), 1 / cell.columns)
        options = dict(numItermax=ITERATIONS, stopThr=0, warn=False)

        def forward() -> None:
            with torch.no_grad():
                ot.bregman.sinkhorn_log(mass, mass, cost[0], EPSILON, **options)

        return forward
    options = dict(reg=EPSILON, max_iter=ITERATIONS, tol=1e-30, grad=mode)
    return _with_backward(cell, lambda cost: solve_batch(cost, **options).value)


def build_geomloss(cell: Cell) -> Callable[[], None]:
    """GeomLoss with its own schedule of blurs down to ours, biased as our value is."""
    from geomloss import SamplesLoss

    loss = SamplesLoss("sinkhorn", p=1, blur=EPSILON, backend="tensorized", debias=False)
    return _with_backward(cell, loss)


def build_floor(cell: Cell) -> Callable[[], None]:
    """What must be moved, and for the large problem the exponentials beside it."""
    first, *_ = _inputs(cell)
    if cell.form != LARGE:
        into = torch.empty_like(first)
        return lambda: into.copy_(first)
    held = -torch.rand(2, 1 << 15)
    into = torch.empty_like(held)

    def call() -> None:
        for _ in range(ITERATIONS):
            first.sum()
            for _ in range(first.numel() // held.numel()):
                torch.exp(held, out=into)

    return call


def _only(package: str, *wanted: tuple[str, str], cell: Cell) -> str | None:
    if (cell.form, cell.kind) not in wanted:
        return "is measured elsewhere"
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return None


def _pot(name: str, mode: str, *wanted: tuple[str, str]) -> Provider:
    refuses = lambda cell: _only("ot", *wanted, cell=cell)  # noqa: E731
    return Provider(name, partial(build_pot, mode=mode), refuses)


PROVIDERS = (
    Provider(OURS, build_ours),
    Provider("eager", build_loop, lambda cell: _only("", (SMALL, "unrolled"), cell=cell)),
    _pot("POT autodiff", "autodiff", (SMALL, "unrolled")),
    _pot("POT last step", "last_step", (SMALL, "implicit")),
    _pot("POT envelope", "envelope", (SMALL, "envelope")),
    _pot("POT log", "", (LARGE, "forward")),
    Provider(
        "GeomLoss", build_geomloss, lambda cell: _only("geomloss", (POINTS, "envelope"), cell=cell)
    ),
)
