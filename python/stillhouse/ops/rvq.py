"""Residual vector quantization: rows as sums of codes, a code from each of several tables."""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import torch
from torch import Tensor

from . import rvq_autograd, rvq_search
from .random import in_int64
from .rows import check_floats, depth_of_rows, mask_of_rows, of_rows
from .rvq_autograd import CODES, GRADIENTS, METRICS, Decode, Quantize, pack


class ResidualCodes(NamedTuple):
    """What `rvq` has found."""

    out: Tensor  # [..., D], the sum of a row's codes
    codes: Tensor  # int64 [..., Q]; -1 beyond a row's depth, and in rows that are not finite
    error: Tensor  # [..., Q], squared distance of a row after each stage; 0 beyond its depth


def rvq_encode(
    x: Tensor,
    codebooks: Tensor,
    *,
    metric: str = "l2",
    num_quantizers: int | Tensor | None = None,
    mask: Tensor | None = None,
    sizes: Tensor | None = None,
    packed: Tensor | None = None,
    return_margin: bool = False,
    beam: int = 1,
    temperature: float = 0.0,
    seed: int | None = None,
    position: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The code of each row in each table: the nearest to what the stages before have left of it.

    Args:
        x: rows [..., D], float32, bfloat16, float16 or float64.
        codebooks: tables [Q, K, D], one for each stage; `table.expand(Q, K, D)` is one that all
            stages share, and is not copied. With a leading G, rows [G, ..., D] have tables of
            their own in each group. float64 where x is.
        metric: "l2", or "cosine", by which the code is chosen whose direction is nearest. What is
            taken off a row is the code as it is in the table.
        num_quantizers: stages, of all rows or int64 [...] of each, from 0; all that there are if
            None.
        mask: bool [...]; False = the row is not quantized.
        sizes: int64 [Q] or [G, Q], codes that count of each table, from 1 to K.
        packed: `rvq_pack` of the same tables with the same metric and sizes, where they stay.
        return_margin: also return how much farther than the nearest code the second one is, as a
            difference of squared distances [..., Q] ("cosine": twice that of |r| cos).
        beam: partial sums that are kept of each row from stage to stage; its codes are then those
            of the last sum that is nearest. For the metric "l2".
        temperature: above 0 a stage's code c is drawn, with probability proportional to
            exp(-|r - c|^2 / temperature) ("cosine": exp(2 |r| cos(r, c) / temperature)).
        seed: what draws are made of, with the row's position, the stage and the code alone: the
            same on any device and in any batch of the same positions.
        position: int64 [...] of rows, their numbers in x if None.

    Returns:
        int64 [..., Q], -1 beyond a row's depth and in rows that are not finite, or whose scores
        r c - |c|^2 / 2 are not. Of equally near codes the lowest. A row's codes do not depend on
        the rows beside it, nor on threads.

    Raises:
        ValueError: shapes, ranges or devices that do not fit, more quantizers than tables, draws
            without a seed, a beam of cosines or of draws, margins of either. Ranges in a tensor
            are checked on the CPU; elsewhere depths and sizes beyond the tables are all of them.
        TypeError: a dtype outside the lists above.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> coarse, fine = torch.tensor([[0.0], [4.0]]), torch.tensor([[-1.0], [1.0]])
        >>> ops.rvq_encode(torch.tensor([[3.2], [0.7]]), torch.stack([coarse, fine]))
        tensor([[1, 0],
                [0, 1]])
    """
    call = Call(x, codebooks, metric, num_quantizers, mask, sizes, packed)
    if beam != 1 or temperature != 0:
        _check_search(call, beam, temperature, seed, return_margin)
        if position is not None:
            position = call.flat(of_rows("position", position, x)).long()
        with torch.no_grad():
            if beam > 1:
                return call.shaped(rvq_search.beam_codes(call, beam))
            return call.shaped(rvq_search.drawn_codes(call, temperature, in_int64(seed), position))
    with torch.no_grad():
        codes, _, _, margin = rvq_autograd.encode(call, want_margin=return_margin)
    codes = call.shaped(codes)
    return (codes, call.shaped(margin)) if return_margin else codes


def _check_search(call: Call, beam: int, temperature: float, seed, return_margin: bool) -> None:
    if operator.index(beam) < 1:
        raise ValueError(f"beam must be at least 1, got {beam}")
    if temperature != 0 and not 0 < 2 / temperature < math.inf:
        raise ValueError(f"temperature must be a number from 0, got {temperature}")
    if temperature > 0 and seed is None:
        raise ValueError("codes that are drawn (temperature > 0) need a seed")
    if beam > 1 and (temperature > 0 or call.metric != "l2"):
        raise ValueError('a beam is of nearest codes by "l2": leave temperature and metric')
    if return_margin:
        raise ValueError("margins are those of nearest codes: leave beam and temperature")


def rvq_pack(codebooks: Tensor, *, metric: str = "l2", sizes: Tensor | None = None) -> Tensor:
    """The tables as the search reads them: what `packed=` of `rvq_encode` and `rvq` takes, worth
    keeping where tables stay and rows are few. Arguments and errors as there."""
    tables = _tables(codebooks)
    return pack(tables, metric, _sizes(sizes, tables))


def rvq_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """The sum of the codes, [..., D] of int64 [..., Q], in the stages' order; -1 adds nothing.

    codebooks: as in `rvq_encode`; Q may be fewer than there are tables. Differentiable in the
    tables. Raises ValueError for shapes that do not fit, no stage or more than there are tables,
    TypeError for codes that are not integers, and on the CPU RuntimeError for codes outside of a
    table.
    """
    tables = _tables(codebooks)
    grouped = codebooks.dim() == 4
    _check_codes(codes)
    if codes.dim() < 1 + grouped or (grouped and codes.shape[0] != len(tables)):
        raise ValueError(
            f"codes must be [..., Q], or [G, ..., Q] with {len(tables)} groups of tables, got "
            f"{tuple(codes.shape)}"
        )
    stages = codes.shape[-1]
    if stages < 1 or (tables.shape[1] > 1 and stages > tables.shape[1]):
        raise ValueError(f"{stages} stages of codes and {tables.shape[1]} codebooks")
    flat = codes.reshape(len(tables), -1, stages).long()
    out = Decode.apply(flat, tables)
    return out.view(*codes.shape[:-1], tables.shape[-1])


def rvq(
    x: Tensor,
    codebooks: Tensor,
    *,
    grad: str = "ste",
    metric: str = "l2",
    num_quantizers: int | Tensor | None = None,
    mask: Tensor | None = None,
    sizes: Tensor | None = None,
    packed: Tensor | None = None,
    codes: Tensor | None = None,
) -> ResidualCodes:
    """Rows quantized, with a gradient.

    Arguments, shapes and errors as in `rvq_encode`; codes: int64 [..., Q] that are taken as they
    are, such as those of a beam or drawn ones, of as many stages as they have; and `grad`, what
    out's derivative to x is said to be, since the true one is 0 (which it is of rows without a
    stage). Published quantizers differ here:

    - "ste": the identity; each stage's error has its own gradient to x (Mimi).
    - "rotation": lambda R, the rotation that takes x to out and the ratio of their lengths
      (arXiv 2410.06424), of the whole sum; "rotation_per_stage" is the sum of that of each stage
      (vector-quantize-pytorch's default).
    - "stage_sum": the identity times the number of stages (vector-quantize-pytorch's
      straight-through form).
    - "encodec": the identity; errors beyond the first stage have no gradient to x.

    error's gradient to the tables is that of |r - c|^2 with r fixed, out's is none. Of error there
    is no second derivative: RuntimeError.
    """
    if grad not in GRADIENTS:
        raise ValueError(f"grad must be one of {', '.join(GRADIENTS)}, got {grad!r}")
    if codes is not None and num_quantizers is not None:
        raise ValueError("codes are of as many stages as they have: leave num_quantizers")
    stages = num_quantizers if codes is None else codes.shape[-1]
    call = Call(x, codebooks, metric, stages, mask, sizes, packed)
    if codes is not None:
        call.codes = checked_codes(codes, x, call)
    codes, out, error = Quantize.apply(call, grad, call.x, call.tables)
    return ResidualCodes(call.shaped(out), call.shaped(codes), call.shaped(error))


def rvq_statistics(
    x: Tensor, codes: Tensor, codebooks: Tensor, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What moving averages of the tables are made of: how many rows each code was given, [Q, K],
    and the sum of what it stands for, [Q, K, D]: residuals before its stage. Codes -1 do not count.

    x [..., D], codes [..., Q], codebooks as in `rvq_encode`; the results have their shapes, one
    table where one is shared. Summed in the rows' order, whatever the number of threads. Raises
    what `rvq_encode` and `rvq_decode` do.
    """
    call = Call(x, codebooks, "l2", codes.shape[-1], None, None, None)
    flat = checked_codes(codes, x, call)
    if mask is not None:
        flat = flat.masked_fill(~call.flat(mask_of_rows(mask, x))[..., None], -1)
    with torch.no_grad():
        counts, sums = rvq_autograd.statistics(call.x, flat, call.tables)
    return (counts, sums) if codebooks.dim() == 4 else (counts[0], sums[0])


def checked_codes(codes: Tensor, x: Tensor, call: Call) -> Tensor:
    """int64 [G, N, Q] of the codes of x's rows."""
    _check_codes(codes)
    if codes.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"{tuple(codes.shape)} codes of {tuple(x.shape)} rows")
    return codes.reshape(*call.x.shape[:2], codes.shape[-1]).long()


class Call:
    """Checked arguments as the op takes them: rows [G, N, D], tables [G, T, K, D]."""

    def __init__(self, x, codebooks, metric, num_quantizers, mask, sizes, packed):
        check_floats(x)
        self.tables = _tables(codebooks, x)
        self.grouped = codebooks.dim() == 4
        groups, width = self.tables.shape[0], self.tables.shape[-1]
        if x.dim() < 1 + self.grouped or x.shape[-1] != width:
            raise ValueError(
                f"x must be [..., {width}] for codes of this width, got {tuple(x.shape)}"
            )
        if self.grouped and x.shape[0] != groups:
            raise ValueError(f"{groups} groups of tables and {x.shape[0]} of rows")
        if x.device != codebooks.device:
            raise ValueError(f"x is on {x.device}, codebooks on {codebooks.device}")
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        self.leading, self.metric = x.shape[:-1], metric
        self.x = x.reshape(groups, -1, width)
        most = codebooks.shape[-3]
        self.depth, self.stages, self.codes = None, most, None
        if isinstance(num_quantizers, Tensor):
            self.depth = self.flat(depth_of_rows(num_quantizers, x, most))
        elif num_quantizers is not None:
            if not 1 <= operator.index(num_quantizers) <= most:
                raise ValueError(
                    f"num_quantizers must be from 1 to {most}, the number of codebooks, got "
                    f"{num_quantizers}"
                )
            self.stages = num_quantizers
        if mask is not None:
            rows = self.flat(mask_of_rows(mask, x))
            depth = torch.full_like(rows, self.stages, dtype=torch.int64)
            self.depth = (depth if self.depth is None else self.depth).masked_fill(~rows, 0)
        self.sizes = _sizes(sizes, self.tables)
        self.given = packed

    @property
    def packed(self) -> Tensor:
        """The tables as the search reads them, made here unless they were given."""
        if self.given is None:
            return pack(self.tables, self.metric, self.sizes)
        groups, count, size, width = self.tables.shape
        made, tables = self.given, self.tables
        if (
            made.shape != (groups, count, -(-size // CODES), width + 1, CODES)
            or made.dtype != tables.dtype
            or made.device != tables.device
        ):
            raise ValueError(
                "packed was made of tables of another shape, dtype or device: rvq_pack them again"
            )
        return self.given

    @property
    def beyond(self) -> Tensor:
        """bool, to [G, N, Q]: stages that a row does not have."""
        stages = torch.arange(self.stages, device=self.x.device)
        return (
            torch.zeros_like(stages).bool()
            if self.depth is None
            else (stages >= self.depth[..., None])
        )

    def flat(self, of_rows: Tensor) -> Tensor:
        """[G, N] of what has the rows' shape."""
        return of_rows.reshape(self.x.shape[:2])

    def shaped(self, found: Tensor) -> Tensor:
        """[G, N, ...] as the rows came."""
        return found.view(*self.leading, found.shape[-1])


def _tables(codebooks: Tensor, x: Tensor | None = None) -> Tensor:
    """[G, T, K, D], T = 1 where all stages share a table."""
    if not isinstance(codebooks, Tensor) or codebooks.dim() not in (3, 4):
        raise ValueError(
            "codebooks must be [Q, K, D], or [G, Q, K, D] in groups, got "
            f"{tuple(getattr(codebooks, 'shape', ()))}"
        )
    if 0 in codebooks.shape:
        raise ValueError(f"codebooks of shape {tuple(codebooks.shape)} have no code")
    if not codebooks.is_floating_point():
        raise TypeError(f"codebooks must be float tensors, got {codebooks.dtype}")
    if x is not None and (x.dtype == torch.float64) != (codebooks.dtype == torch.float64):
        raise TypeError(f"x is {x.dtype} and codebooks {codebooks.dtype}: float64 goes with itself")
    if codebooks.dtype not in (torch.float32, torch.float64):
        codebooks = codebooks.float()
    if codebooks.stride(-3) == 0:
        codebooks = codebooks.narrow(-3, 0, 1)
    return codebooks if codebooks.dim() == 4 else codebooks[None]


def _sizes(sizes: Tensor | None, tables: Tensor) -> Tensor | None:
    if sizes is None:
        return None
    if not isinstance(sizes, Tensor) or sizes.dtype != torch.int64:
        raise TypeError(f"sizes must be int64, got {getattr(sizes, 'dtype', type(sizes))}")
    if sizes.numel() != tables.shape[0] * tables.shape[1]:
        raise ValueError(f"sizes must be one for each table, got {tuple(sizes.shape)}")
    codes = tables.shape[2]
    if sizes.is_cpu and not torch.compiler.is_compiling():
        low, high = int(sizes.min()), int(sizes.max())
        if low < 1 or high > codes:
            raise ValueError(f"sizes must be from 1 to {codes}, got {low} to {high}")
    # There is nothing to read beyond the tables.
    return sizes.reshape(tables.shape[:2]).clamp(max=codes)


def _check_codes(codes: Tensor) -> None:
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise TypeError(f"codes must be int64, got {codes.dtype}")
