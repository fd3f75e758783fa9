"""The family of dual-binary weights: 4,096 x 4,096 in groups of 64, rows of x from 1 to 256.

Weights are cold: every provider takes turns over so many matrices that they are several times the
last-level cache. Up to 16 rows of x, a measurement is 32 matrices in a row, as layers of a model
follow each other; `alone` is one call after those of the other providers, which have emptied all
caches and let threads fall asleep. `hot` is one matrix of 2,048 rows ten times in a row, what the
kernel can do when memory does not hold it up. The floor of a product is one read of the packed
bytes (torch's maximum of them as integers, its fastest reader), that of `backward` the two dense
products of that dtype. `int8` has the quantizing of x in its time. Rows of the grid are those of x.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import ggml
from .divergence import OURS
from .grid import Cell, Provider

NAME = "fdb"
FORWARD, INT8, BACKWARD = "forward", "int8", "backward"
COLD, HOT, ALONE = "cold", "hot", "alone"
SIZE, GROUP = 4096, 64
HOT_ROWS, HOT_PRODUCTS, COLD_PRODUCTS = 2048, 10, 32
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
    hot = Cell(NAME, FORWARD, HOT, "fp32", 1, SIZE)
    alone = [Cell(NAME, FORWARD, ALONE, dtype, 1, SIZE) for dtype in DTYPES]
    return [*forward, hot, *alone, *int8, *backward]


def products(cell: Cell) -> int:
    """Products of one call."""
    if cell.form == HOT:
        return HOT_PRODUCTS
    return COLD_PRODUCTS if cell.form == COLD and cell.rows <= 16 else 1


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


@cache
def _packed_in_4_bits() -> tuple[list[Tensor], Tensor]:
    """Integers of torch's product with weights of 4 bits, scales and offsets of groups."""
    integers = torch.randint(16, (SIZE, SIZE), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
    scales = torch.randn(SIZE // GROUP, SIZE, 2).bfloat16()
    return [packed.clone() for _ in range(_matrices(SIZE * SIZE // 2))], scales


def _turns(cell: Cell, weights: list, product: Callable[[object], object]) -> Callable[[], None]:
    turn, times = itertools.cycle(weights), products(cell)

    def run() -> None:
        with torch.no_grad():
            for _ in range(times):
                product(next(turn))

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


def build_int4(cell: Cell) -> Callable[[], None]:
    """torch's product with weights of 4 bits, twice as many bytes."""
    x, (weights, scales) = _rows(cell), _packed_in_4_bits()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return _turns(cell, weights, lambda weight: product(x, weight, GROUP, scales))


def build_q2_k(cell: Cell) -> Callable[[], None]:
    """llama.cpp's weights of 2.6 bits, all of them in a graph."""
    weight = torch.randn(SIZE, SIZE)
    return ggml.Products(_rows(cell).float(), weight, products(cell))


def build_floor(cell: Cell) -> Callable[[], None]:
    """A read of the packed bytes, or the two dense products."""
    if cell.kind == BACKWARD:
        x, (weight, *_) = _rows(cell), _dense(DTYPES[cell.dtype])
        upstream = torch.randn_like(x)
        return lambda: (upstream @ weight, upstream.T @ x)
    return _turns(
        cell,
        _packed(cell.form),
        lambda w: (w.tiles.max(), w.scales.view(torch.int32).max()),
    )


def _dense_refuses(cell: Cell) -> str | None:
    if cell.form == HOT:
        return "is measured cold"
    return "has no scales" if cell.kind == BACKWARD else None


def _only_on_cpu() -> str | None:
    return "runs on the CPU alone" if torch.get_default_device().type != "cpu" else None


def _int4_refuses(cell: Cell) -> str | None:
    if cell.kind != FORWARD or cell.dtype != "bf16":
        return "takes rows of bf16 in the forward pass"
    return _only_on_cpu()


def _q2_k_refuses(cell: Cell) -> str | None:
    if (cell.kind, cell.form, cell.dtype) != (FORWARD, COLD, "fp32") or products(cell) == 1:
        return "takes rows of fp32, as a graph of many products"
    return _only_on_cpu() if ggml.folder() else "llama-cpp-python is not installed"


PROVIDERS = (
    Provider(OURS, build_ours),
    Provider("torch fp32", _build_linear(torch.float32), _dense_refuses),
    Provider("torch bf16", _build_linear(torch.bfloat16), _dense_refuses),
    Provider("torch int4", build_int4, _int4_refuses),
    Provider("llama.cpp Q2_K", build_q2_k, _q2_k_refuses),
)
