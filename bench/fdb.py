"""The family of dual-binary weights: 4,096 x 4,096 in groups of 64, rows of x from 1 to 256.

Weights are cold: every provider takes turns over so many matrices that they are several times the
last-level cache. `hot` is one matrix of 2,048 rows ten times in a row, what the kernel can do when
memory does not hold it up. The floor of a product is one read of the packed bytes (torch's sum of
them), that of `backward` the two dense products of that dtype. `int8` has the quantizing of x in
its time. Rows of the grid are those of x.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import calls
from .divergence import OURS
from .grid import Cell, Provider

NAME = "fdb"
FORWARD, INT8, BACKWARD = "forward", "int8", "backward"
COLD, HOT = "cold", "hot"
SIZE, GROUP = 4096, 64
HOT_ROWS, HOT_CALLS = 2048, 10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_BYTES = 2 << 30  # of one provider's matrices
PAUSE_SECONDS = 0.0  # all providers run on torch's own pool


def grid() -> list[Cell]:
    """Products, rows of int8, and gradients."""
    forward = [
        Cell(NAME, FORWARD, COLD, dtype, m, SIZE)
        for dtype in DTYPES
        for m in (1, 2, 4, 8, 16, 64, 256)
    ]
    int8 = [Cell(NAME, INT8, COLD, "fp32", m, SIZE) for m in (1, 4, 16, 256)]
    backward = [Cell(NAME, BACKWARD, COLD, dtype, 256, SIZE) for dtype in DTYPES]
    return [*forward, Cell(NAME, FORWARD, HOT, "fp32", 1, SIZE), *int8, *backward]


def _matrices(size: int) -> int:
    """How many of `size` bytes are several times the last-level cache."""
    found = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    kib = int(found.read_text().strip().rstrip("K")) if found.exists() else 1 << 16
    return max(32, min(4 * kib << 10, MOST_BYTES) // size)


def _rows(cell: Cell) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(cell.rows, SIZE, generator=generator, device="cpu")
    return x.to(torch.get_default_device(), DTYPES[cell.dtype])


def packed_bytes(rows: int = SIZE) -> int:
    """Planes and float16 scales of a matrix."""
    return rows * SIZE // 4 + rows * SIZE // GROUP * 4


@cache
def _packed(form: str) -> list:
    """Distinct weights: rows of one, rolled."""
    from stillhouse import ops

    rows = HOT_ROWS if form == HOT else SIZE
    generator = torch.Generator().manual_seed(0)
    planes = torch.rand(2, rows, SIZE, generator=generator, device="cpu") < 0.4
    alpha = torch.randn(2, rows, SIZE // GROUP, generator=generator, device="cpu").half()
    device = torch.get_default_device()
    words = ops.fdb_pack(planes, alpha).planes.to(device)
    count = 1 if form == HOT else _matrices(packed_bytes())
    return [
        ops.FDBPacked.from_words(words.roll(i, 1), alpha.to(device), SIZE) for i in range(count)
    ]


@cache
def _dense(dtype: torch.dtype) -> list[Tensor]:
    count = _matrices(SIZE * SIZE * dtype.itemsize)
    weight = torch.randn(SIZE, SIZE).to(dtype)
    return [weight.clone() for _ in range(count)]


def _turns(cell: Cell, weights: list, call: Callable[[object], object]) -> Callable[[], None]:
    turn, times = itertools.cycle(weights), HOT_CALLS if cell.form == HOT else 1

    def run() -> None:
        with torch.no_grad():
            for _ in range(times):
                call(next(turn))

    return run


def build_ours(cell: Cell) -> Callable[[], None]:
    """`ops.fdb_matmul`; of `backward` the op that autograd calls."""
    from stillhouse import ops

    x, weights = _rows(cell), _packed(cell.form)
    if cell.kind == FORWARD:
        return _turns(cell, weights, lambda weight: ops.fdb_matmul(x, weight))
    if cell.kind == INT8:
        return _turns(cell, weights, lambda w: ops.fdb_matmul(ops.fdb_quantize(x, GROUP), w))
    gradient, upstream = torch.ops.stillhouse.fdb_gradient, torch.randn_like(x)
    return _turns(cell, weights, lambda w: gradient(upstream, x, w.tiles, w.scales, True, True))


def _build_linear(dtype: torch.dtype) -> Callable[[Cell], Callable[[], None]]:
    def build(cell: Cell) -> Callable[[], None]:
        x, weights = _rows(cell).to(dtype), _dense(dtype)
        return _turns(cell, weights, lambda weight: linear(x, weight))

    return build


def build_floor(cell: Cell) -> Callable[[], None]:
    """A read of the packed bytes, or the two dense products."""
    if cell.kind == BACKWARD:
        x, (weight, *_) = _rows(cell), _dense(DTYPES[cell.dtype])
        upstream = torch.randn_like(x)
        return lambda: (upstream @ weight, upstream.T @ x)
    return _turns(
        cell,
        _packed(cell.form),
        lambda w: (w.tiles.view(torch.float32).sum(), w.scales.view(torch.float32).sum()),
    )


def _dense_refuses(cell: Cell) -> str | None:
    if cell.form == HOT:
        return "is measured cold"
    return "has no scales" if cell.kind == BACKWARD else None


PROVIDERS = (
    Provider(OURS, build_ours),
    Provider("torch fp32", _build_linear(torch.float32), _dense_refuses),
    Provider("torch bf16", _build_linear(torch.bfloat16), _dense_refuses),
)


def runners(
    cell: Cell, providers: list[Provider], device: str
) -> dict[str, Callable[[int], float]]:
    """The functions to time at a cell, and the floor."""
    return calls.runners(cell, providers, device, build_floor)


def memory_call(
    cell: Cell, name: str, threads: int, device: str
) -> tuple[Callable[[], object], int]:
    """For `measure.peak_memory`: the warmed-up call, and no gradient."""
    return calls.memory_call(PROVIDERS, cell, name, threads, device)
