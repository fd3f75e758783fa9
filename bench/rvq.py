"""The family of residual quantizers: 1,024 codes, the same tables on all sides.

`plain`: eight stages as wide as the rows; the floor is the eight products of rows and tables that
an exact search needs, with torch.mm into a buffer. `dac`: nine stages of 8 features with
projections of their own (Descript Audio Codec); the floor has those projections beside the
products. The kind is "infer", or "train": a step with codes, output and losses, the backward pass,
and what moves the tables: running means, or for `dac` their gradient.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

from .divergence import OURS
from .grid import Cell, Provider

NAME = "rvq"
PLAIN, DAC, INFER, TRAIN = "plain", "dac", "infer", "train"
CODES, NARROW = 1024, 8
STAGES = {PLAIN: 8, DAC: 9}
# All providers run on torch's own pool, and frames of a stream take less than waking it does.
PAUSE_SECONDS = 0.0


def grid() -> list[Cell]:
    """Batches, frames of a stream, and as many rows as memory is measured with."""
    shapes = [
        *((INFER, PLAIN, n, 128) for n in (1, 64, 2400, 65536)),
        *((TRAIN, PLAIN, n, 128) for n in (2400, 65536)),
        *((kind, PLAIN, 2400, 1024) for kind in (INFER, TRAIN)),
        *((kind, DAC, 2400, 1024) for kind in (INFER, TRAIN)),
    ]
    return [Cell(NAME, kind, form, "fp32", n, d) for kind, form, n, d in shapes]


@cache
def _inputs(cell: Cell) -> tuple[Tensor, Tensor]:
    """Rows [1, N, D] and tables [Q, K, d], later ones smaller as residuals are."""
    generator = torch.Generator().manual_seed(0)
    stages = STAGES[cell.form]
    width = NARROW if cell.form == DAC else cell.columns
    x = torch.randn(1, cell.rows, cell.columns, generator=generator, device="cpu")
    tables = torch.randn(stages, CODES, width, generator=generator, device="cpu")
    tables *= (0.8 ** torch.arange(stages, device="cpu"))[:, None, None]
    device = torch.get_default_device()
    return x.to(device), tables.to(device)


def _call(
    cell: Cell, module: nn.Module, x: Tensor, results: Callable[..., tuple[Tensor, Tensor]]
) -> Callable[[], None]:
    """`results(module(x))` gives output and losses."""
    if cell.kind == INFER:
        module.eval()

        def infer() -> None:
            with torch.no_grad():
                module(x)

        return infer
    module.train()
    leaf, learnt = x.clone().requires_grad_(), list(module.parameters())
    # What a decoder and a loss would send back; they themselves are not measured.
    upstream, of_losses = torch.randn_like(x), None

    def step() -> None:
        nonlocal of_losses
        leaf.grad = None
        for parameter in learnt:
            parameter.grad = None
        out, losses = results(module(leaf))
        if of_losses is None:
            of_losses = torch.ones_like(losses)
        torch.autograd.backward((out, losses), (upstream, of_losses))

    return step


def build_ours(cell: Cell) -> Callable[[], None]:
    """`nn.ResidualVQ`."""
    from stillhouse.nn import ResidualVQ

    x, tables = _inputs(cell)
    options = {}
    if cell.form == DAC:
        options = dict(codebook_dim=NARROW, projection="per_stage", metric="cosine")
        options |= dict(update="gradient", commitment_weight=0.25)
    module = ResidualVQ(cell.columns, CODES, STAGES[cell.form], kmeans_init=False, **options)
    with torch.no_grad():
        module.tables.copy_(tables[None])
        if cell.form == PLAIN:
            module.sums.copy_(tables[None])
            module.counts.fill_(1)
    return _call(cell, module, x, lambda found: (found.out, found.commit_loss))


def lucidrains(cell: Cell) -> nn.Module:
    """vector-quantize-pytorch's residual quantizer in its straight-through form."""
    from vector_quantize_pytorch import ResidualVQ

    _, tables = _inputs(cell)
    options = dict(kmeans_init=False, rotation_trick=False, decay=0.99)
    module = ResidualVQ(
        dim=cell.columns, num_quantizers=STAGES[PLAIN], codebook_size=CODES, **options
    )
    with torch.no_grad():
        for layer, table in zip(module.layers, tables, strict=True):
            layer._codebook.embed.copy_(table[None])
            layer._codebook.embed_avg.copy_(table[None])
            layer._codebook.cluster_size.fill_(1)
    return module


def build_lucidrains(cell: Cell) -> Callable[[], None]:
    """Output, codes and losses of [B, N, D]."""
    return _call(cell, lucidrains(cell), _inputs(cell)[0], lambda found: (found[0], found[2]))


def build_encodec(cell: Cell) -> Callable[[], None]:
    """EnCodec's quantizer, of [B, D, N] as its encoder has it."""
    inner = _module_of("encodec", "quantization.core_vq")
    x, tables = _inputs(cell)
    options = dict(dim=cell.columns, codebook_size=CODES, decay=0.99, kmeans_init=False)
    module = inner.ResidualVectorQuantization(num_quantizers=STAGES[PLAIN], **options)
    with torch.no_grad():
        for layer, table in zip(module.layers, tables, strict=True):
            layer._codebook.embed.copy_(table)
            layer._codebook.embed_avg.copy_(table)
            layer._codebook.cluster_size.fill_(CODES)
    frames = x.mT.contiguous()
    return _call(cell, module, frames, lambda found: (found[0], found[2]))


def dac(cell: Cell) -> nn.Module:
    """The Descript Audio Codec's quantizer."""
    inner = _module_of("dac", "nn.quantize")
    _, tables = _inputs(cell)
    torch.manual_seed(0)
    sizes = dict(input_dim=cell.columns, codebook_size=CODES, codebook_dim=NARROW)
    module = inner.ResidualVectorQuantize(n_codebooks=STAGES[DAC], quantizer_dropout=0.0, **sizes)
    with torch.no_grad():
        for stage, table in zip(module.quantizers, tables, strict=True):
            stage.codebook.weight.copy_(table)
    return module


def build_dac(cell: Cell) -> Callable[[], None]:
    """Of [B, D, N]; the loss of the codes has weight 1, that of the rows 0.25."""
    frames = _inputs(cell)[0].mT.contiguous()
    return _call(cell, dac(cell), frames, lambda found: (found[0], 0.25 * found[3] + found[4]))


@cache
def _folder(package: str) -> str | None:
    """Where it is installed."""
    found = importlib.util.find_spec(package)
    return None if found is None else found.submodule_search_locations[0]


def _module_of(package: str, name: str) -> ModuleType:
    """A module of a package whose own imports are not installed: parents are left empty."""
    folder = _folder(package)
    parts = [package, *name.split(".")[:-1]]
    for depth in range(1, len(parts) + 1):
        parent = ".".join(parts[:depth])
        if parent not in sys.modules:
            module = sys.modules[parent] = ModuleType(parent)
            module.__path__ = ["/".join([folder, *parts[1:depth]])]
    return importlib.import_module(f"{package}.{name}")


def build_floor(cell: Cell) -> Callable[[], None]:
    """The products alone."""
    x, tables = _inputs(cell)
    rows, across = x[0], [table.T.contiguous() for table in tables]
    scores = rows.new_empty(cell.rows, CODES)
    if cell.form == PLAIN:
        return lambda: [torch.mm(rows, table, out=scores) for table in across]
    into, back = (torch.randn(*shape) for shape in ((cell.columns, NARROW), (NARROW, cell.columns)))
    narrow, wide = rows.new_empty(cell.rows, NARROW), torch.empty_like(rows)

    def call() -> None:
        for table in across:
            torch.mm(rows, into, out=narrow)
            torch.mm(narrow, table, out=scores)
            torch.mm(narrow, back, out=wide)

    return call


def _only(form: str, package: str) -> Callable[[Cell], str | None]:
    def refuses(cell: Cell) -> str | None:
        if cell.form != form:
            return "has another layout"
        return None if _folder(package) else f"{package} is not installed"

    return refuses


PROVIDERS = (
    Provider(OURS, build_ours),
    Provider("vector-quantize-pytorch", build_lucidrains, _only(PLAIN, "vector_quantize_pytorch")),
    Provider("EnCodec", build_encodec, _only(PLAIN, "encodec")),
    Provider("DAC", build_dac, _only(DAC, "dac")),
)
