"""Quantization without tables: each number of a row is rounded by itself.

Plain torch, elementwise, so that torch.compile makes one kernel of it. Everything is computed in
float32 (float64 for float64) and codes in int64, whatever the dtype of the rows: in bfloat16 a code
above 256 would come out wrong.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import check_floats, depth_of_rows, mask_of_rows
from .rvq import ResidualCodes

FORMS = ("offset", "symmetric")
BOUNDS = ("tanh", "clamp")
GRADIENTS = ("ste", "stage_sum")
WIDER = 1e-3  # by which the paper's tanh goes beyond the outermost levels, so that they are reached


class ScalarCodes(NamedTuple):
    """What `fsq`, `lfq` and `bsq` have found."""

    out: Tensor  # [..., d], float32 or float64
    codes: Tensor  # int64 [...]; -1 of masked rows and of rows that are not finite
    indices: Tensor  # int64 [..., d], which level, or which bit; -1 where codes are


def fsq(
    x: Tensor,
    levels: Sequence[int] | Tensor,
    *,
    form: str = "offset",
    bound: str = "tanh",
    mask: Tensor | None = None,
) -> ScalarCodes:
    """Finite scalar quantization: x_i bounded, then rounded to one of L_i levels.

    - "offset" (arXiv 2309.15505, appendix A.1): b = h tanh(x + atanh(o / h)) - o with
      h = 1.001 (L - 1) / 2 and o = 1/2 for even L, else 0; out = round(b) / floor(L / 2). Levels of
      an even L reach from -1 to 1 - 2 / L.
    - "symmetric" (arXiv 2411.19842, section 3.2): k = floor((L - 1) (tanh(x) + 1) / 2 + 1/2) and
      out = 2 k / (L - 1) - 1.

    Rounding passes gradients straight through; those of the bound stay. The code of a row is
    sum_i k_i prod_{j<i} L_j: its first number counts least.

    Args:
        x: rows [..., d], float32, bfloat16, float16 or float64.
        levels: L_i, d of them; as an int64 tensor [d] on x's device they are taken as they are,
            unchecked, and nothing is copied.
        form: "offset" or "symmetric".
        bound: "tanh", or "clamp" to [-1, 1], which leaves the symmetric form's levels where
            they are.
        mask: bool [...]; False = the row is not quantized, and out is 0.

    Rows that are not finite get the code -1 and NaN.

    Raises:
        ValueError: fewer than 2 levels (3 in the offset form, whose second level of two begins at
            x = -3.8), more than 2^63 - 1 codes, another number of levels than x is wide.
        TypeError: levels that are not ints, x that is not of floats, a mask that is not bool.

    Defaults: the paper's form.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> found = ops.fsq(torch.tensor([[-3.0, 0.1, 3.0]]), [8, 5, 5])
        >>> found.out, found.codes
        (tensor([[-1.,  0.,  1.]]), tensor([176]))
    """
    one_of("form", form, FORMS)
    one_of("bound", bound, BOUNDS)
    levels = _levels(levels, x, form)
    wide, rows, fill = _rows(x, mask)
    soft, index = _rounded(wide, levels, form, bound)
    weights = levels.cumprod(0) // levels
    return _coded(_level(index, levels, form), soft, index, weights, rows, fill)


def fsq_decode(
    codes: Tensor,
    levels: Sequence[int] | Tensor,
    *,
    form: str = "offset",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The rows [..., d] that `fsq` gives int64 codes [...]; -1 is a row of zeros.

    Raises ValueError as `fsq` does, and on the CPU for codes that there are not.
    """
    one_of("form", form, FORMS)
    levels = _levels(levels, None, form, codes.device)
    steps = levels.cumprod(0)
    _check_codes(codes, steps[-1])
    index = codes[..., None] // (steps // levels) % levels
    value = _level(index.to(torch.promote_types(dtype, torch.float32)), levels, form)
    return torch.where((codes >= 0)[..., None], value, 0.0).to(dtype)


def residual_fsq(
    x: Tensor,
    levels: Sequence[int] | Tensor,
    stages: int,
    *,
    grad: str = "ste",
    num_quantizers: int | Tensor | None = None,
    mask: Tensor | None = None,
) -> ResidualCodes:
    """Finite scalar quantization in stages, each of what the ones before have left.

    b = e tanh(x / e) with e = L / (L - 1); stage s = 0, 1, ... quantizes the residual r of b by
    L^-s fsq(L^s r), symmetric and clamped: the levels of a stage cut each cell of the one before
    into L equal ones, and the indices of a number are its digits in base L.

    Args:
        x, levels, mask: as in `fsq`.
        stages: how many there are, Q.
        grad: "ste", out's derivative to b is the identity; "stage_sum", the number of stages whose
            residual the clamp did not cut (vector-quantize-pytorch).
        num_quantizers: stages, of all rows or int64 [...] of each; all that there are if None.

    Returns:
        `ResidualCodes` as of `rvq`: error is |b - out|^2 after each stage, with a gradient to x.

    Raises ValueError and TypeError as `fsq`, and ValueError for more quantizers than stages.

    Source: vector-quantize-pytorch 1.32, whose stages have the scales L^-s (before: (L - 1)^-s).

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> x = torch.tensor([[0.3], [-2.0]])
        >>> found = ops.residual_fsq(x, [3], 4)
        >>> found.codes
        tensor([[1, 2, 1, 0],
                [0, 0, 1, 2]])
        >>> torch.equal(ops.residual_fsq_decode(found.codes, [3]), found.out)
        True
    """
    one_of("grad", grad, GRADIENTS)
    levels = _levels(levels, x, "symmetric")
    if operator.index(stages) < 1:
        raise ValueError(f"there must be one stage or more, got {stages}")
    wide, rows, fill = _rows(x, mask)
    depth = None
    if isinstance(num_quantizers, Tensor):
        depth = depth_of_rows(num_quantizers, x, stages)
        rows, fill = rows & (depth > 0), fill.masked_fill(depth < 1, 0)
    elif num_quantizers is not None:
        if not 1 <= num_quantizers <= stages:
            raise ValueError(
                f"num_quantizers must be from 1 to {stages}, the number of stages, got "
                f"{num_quantizers}"
            )
        stages = num_quantizers
    edge = 1 + 1 / (levels - 1).to(wide.dtype)
    bounded = torch.tanh(wide / edge) * edge
    weights = levels.cumprod(0) // levels
    slope = bounded - bounded.detach()  # zeros, with the gradient
    residual, out = bounded.detach(), torch.zeros_like(bounded.detach())
    through = torch.zeros_like(out)
    codes, error = [], []
    for stage in range(stages):
        scale = levels.to(wide.dtype) ** -stage
        here = rows if depth is None else rows & (depth > stage)
        scaled = residual / scale
        index = _rounded(scaled, levels, "symmetric", "clamp")[1]
        codes.append(torch.where(here, (index.long() * weights).sum(-1), -1))
        value = torch.where(here[..., None], _level(index, levels, "symmetric") * scale, 0.0)
        residual, out = residual - value, out + value
        through = through + (here[..., None] & (scaled.abs() <= 1))
        broken = fill if depth is None else fill.masked_fill(depth <= stage, 0)
        error.append(torch.where(here, (residual + slope).square().sum(-1), broken))
    if grad == "ste":
        through = 1.0
    out = torch.where(rows[..., None], out + through * slope, fill[..., None])
    return ResidualCodes(out, torch.stack(codes, -1), torch.stack(error, -1))


def residual_fsq_decode(
    codes: Tensor, levels: Sequence[int] | Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The sum of the stages' levels, [..., d] of int64 [..., Q]; -1 adds nothing. Raises ValueError
    as `fsq_decode`."""
    levels = _levels(levels, None, "symmetric", codes.device)
    wide = torch.promote_types(dtype, torch.float32)
    out = torch.zeros(*codes.shape[:-1], len(levels), dtype=wide, device=codes.device)
    for stage, of_stage in enumerate(codes.unbind(-1)):
        scale = levels.to(wide) ** -stage
        out = out + fsq_decode(of_stage, levels, form="symmetric", dtype=wide) * scale
    return out.to(dtype)


def lfq(x: Tensor, *, mask: Tensor | None = None) -> ScalarCodes:
    """Lookup-free quantization: out = sign(x), 1 or -1, and -1 of 0 (arXiv 2310.05737).

    x [..., d] and mask as in `fsq`, d up to 63; out's derivative to x is the identity. The code
    sum_i 2^(d-1-i) [x_i > 0] has its first bit count most, as vector-quantize-pytorch's (the
    paper's counts least). `lfq_entropy` is the loss that goes with it.

    Raises TypeError as `fsq`, ValueError for rows of no number or of more than 63.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> found = ops.lfq(torch.tensor([[0.2, -3.0, 0.1]]))
        >>> found.out, found.codes
        (tensor([[ 1., -1.,  1.]]), tensor([5]))
    """
    wide, rows, fill = _rows(x, mask)
    bit = wide > 0
    weights = _bit_weights(x.shape[-1], x.device)
    return _coded(bit.to(wide.dtype) * 2 - 1, wide, bit, weights, rows, fill)


def lfq_decode(codes: Tensor, bits: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows [..., bits] that `lfq` gives int64 codes [...]; -1 is a row of zeros. Raises
    ValueError for bits outside 1 to 63, and on the CPU for codes that there are not."""
    weights = _bit_weights(bits, codes.device)
    _check_codes(codes, (weights[0] - 1) + weights[0], last=True)
    signs = ((codes[..., None] & weights) != 0).to(dtype) * 2 - 1
    return torch.where((codes >= 0)[..., None], signs, 0)


def bsq(x: Tensor, *, mask: Tensor | None = None) -> ScalarCodes:
    """Binary spherical quantization: `lfq` of u = x / |x| on the unit sphere, with
    out = sign(u) / sqrt d (arXiv 2406.07548). Arguments, codes and errors as of `lfq`.

    out's derivative to u is the identity, so that to x it is (I - u u^T) / |x|; of a row of zeros,
    which has no direction, it is 0. `bsq_entropy` is the loss that goes with it.
    """
    wide, rows, fill = _rows(x, mask)
    bit, weights = wide > 0, _bit_weights(x.shape[-1], x.device)
    value = (bit.to(wide.dtype) * 2 - 1) / math.sqrt(x.shape[-1])
    return _coded(value, on_sphere(wide), bit, weights, rows, fill)


def bsq_decode(codes: Tensor, bits: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows [..., bits] that `bsq` gives codes; as `lfq_decode`."""
    return lfq_decode(codes, bits, dtype=dtype) / math.sqrt(bits)


def on_sphere(x: Tensor) -> Tensor:
    """x / |x|, zeros where x is zeros."""
    # The direction does not depend on the size; without it, squares overflow or vanish.
    size = x.detach().abs().amax(-1, keepdim=True)
    there = size != 0
    scaled = x / torch.where(there, size, 1)
    length = torch.where(there, scaled.square().sum(-1, keepdim=True), 1).sqrt()
    return torch.where(there, scaled / length, 0.0)


def _rounded(x: Tensor, levels: Tensor, form: str, bound: str) -> tuple[Tensor, Tensor]:
    """Before rounding, on the scale of the output; and the index of the level, of x's dtype."""
    most = (levels - 1).to(x.dtype)
    if form == "symmetric":
        soft = torch.tanh(x) if bound == "tanh" else x.clamp(-1, 1)
        index = torch.floor(most * (soft.detach() + 1) / 2 + 0.5)
    else:
        half, center = most * (1 + WIDER) / 2, levels // 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0).to(x.dtype)
        if bound == "tanh":
            within = torch.tanh(x + torch.atanh(offset / half))
        else:
            within = (x + offset / half).clamp(-1, 1)
        bounded = within * half - offset
        index = torch.round(bounded.detach()) + center
        soft = bounded / center
    # Of 1001 levels and more, the wider tanh would round to levels that there are not.
    return soft, torch.minimum(index.clamp(min=0), most)


def _level(index: Tensor, levels: Tensor, form: str) -> Tensor:
    """The value of a level, by its index."""
    if form == "symmetric":
        return (2 * index - (levels - 1)) / (levels - 1)
    return (index - levels // 2) / (levels // 2)


def _coded(value, soft, index, weights, rows, fill) -> ScalarCodes:
    # soft - soft is 0 exactly: out is the value itself, with the gradient of soft.
    out = torch.where(rows[..., None], value.detach() + (soft - soft.detach()), fill[..., None])
    index = index.long()
    codes = torch.where(rows, (index * weights).sum(-1), -1)
    return ScalarCodes(out, codes, torch.where(rows[..., None], index, -1))


def _rows(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x in float32 or float64 with zeros for what is not quantized; which rows are; and the value
    of those that are not: 0 of masked ones, else NaN."""
    check_floats(x)
    if x.dim() < 1:
        raise ValueError("x must be [..., d], got a number")
    finite = x.isfinite().all(-1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    fill = torch.where(finite, 0.0, torch.nan).to(wide.dtype)
    if mask is None:
        rows = finite
    else:
        mask = mask_of_rows(mask, x)
        rows, fill = finite & mask, fill.masked_fill(~mask, 0)
    return torch.where(rows[..., None], wide, 0.0), rows, fill


def check_levels(levels: Sequence[int], form: str) -> tuple[int, ...]:
    """As ints; raises what `fsq` does."""
    try:
        found = tuple(operator.index(each) for each in levels)
        if any(isinstance(each, bool) for each in levels):
            raise TypeError
    except TypeError:
        raise TypeError(
            f"levels must be ints, one for each number of a row, got {levels!r}"
        ) from None
    if not found or min(found) < 2:
        raise ValueError(f"each dimension needs two levels or more, got {list(found)}")
    if form == "offset" and min(found) < 3:
        raise ValueError(f"two levels need form='symmetric', got {list(found)} in the offset form")
    if math.prod(found) >= 2**63:
        raise ValueError(f"{list(found)} are more codes than int64 has numbers")
    return found


def _levels(levels, x: Tensor | None, form: str, device: torch.device | None = None) -> Tensor:
    if not isinstance(levels, Tensor):
        found = check_levels(levels, form)
        levels = torch.tensor(found, device=device if x is None else x.device)
    elif levels.dtype != torch.int64 or levels.dim() != 1:
        raise TypeError(f"levels must be int64 [d], got {levels.dtype} {tuple(levels.shape)}")
    if x is not None and (x.dim() < 1 or x.shape[-1] != len(levels)):
        raise ValueError(
            f"x must be [..., {len(levels)}], one number for each of the levels, got "
            f"{tuple(x.shape)}"
        )
    return levels


def _bit_weights(bits: int, device: torch.device) -> Tensor:
    if not 1 <= bits <= 63:
        raise ValueError(f"a code has from 1 to 63 bits, got {bits}")
    return 1 << torch.arange(bits - 1, -1, -1, device=device)


def _check_codes(codes: Tensor, size: Tensor, last: bool = False) -> None:
    """On the CPU, where it does not wait for a device; size is a code too many, or the last one."""
    if not codes.is_cpu or torch.compiler.is_compiling() or not codes.numel():
        return
    low, high = codes.min(), codes.max()
    if low < -1 or high > size or (high == size and not last):
        raise ValueError(
            f"codes must be from -1 to {int(size) - (not last)}, got {int(low)} to {int(high)}"
        )


def one_of(name: str, given: str, known: tuple[str, ...]) -> None:
    """Raises ValueError for a word that is not known."""
    if given not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
