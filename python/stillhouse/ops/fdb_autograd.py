"""The registered ops of dual-binary weights: their shapes for the compiler, and how gradients go.

All ride on one kernel family (csrc/dual_binary). Rows are [M, K] here, weights tiles and scales
as in fdb_reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import divergence_autograd, fdb_reference
from .divergence_autograd import warn_without_kernel


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of rows of a dtype are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_matmul(x, tiles, scales, bias, rows):
    return x.new_empty(x.shape[0], rows)


def _fake_matmul_int8(x, steps, tiles, scales, bias, rows, dtype):
    return x.new_empty((x.shape[0], rows), dtype=dtype)


def _fake_quantize(x, groups):
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((x.shape[0], groups), dtype=torch.float32),
    )


def _fake_dequantize(tiles, scales, rows, columns, dtype):
    return tiles.new_empty((rows, columns), dtype=dtype)


def _fake_gradient(upstream, x, tiles, scales, want_x, want_scales):
    return (
        x.new_empty(x.shape if want_x else (0,)),
        x.new_empty(scales.shape if want_scales else (0,), dtype=sum_dtype(x.dtype)),
    )


def hold(tiles: Tensor) -> Tensor:
    """A contiguous copy that products read fast."""
    if tiles.device.type == "cpu":
        return torch.ops.stillhouse.in_huge_pages.default(tiles)
    return tiles.contiguous()


def has_kernel(x: Tensor) -> bool:
    """Whether the kernels are built for its device; says so where they are not."""
    if divergence_autograd.has_kernel(x):
        return True
    warn_without_kernel(x, "dual-binary")
    return False


def product(x: Tensor, tiles: Tensor, scales: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """[M, N] in the dtype of x [M, K]; gradients go to x, scales and bias."""
    learns = x.requires_grad or scales.requires_grad or (bias is not None and bias.requires_grad)
    # A call of its own: autograd's takes longer than the product of a row with a small weight.
    if learns and torch.is_grad_enabled():
        return _Product.apply(x, tiles, scales, bias, rows)
    return _matmul(x, tiles, scales, bias, rows)


def _matmul(x: Tensor, tiles: Tensor, scales: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    if has_kernel(x):
        return divergence_autograd.kernels().fdb_matmul.default(x, tiles, scales, bias, rows)
    weight = _planes_and_alpha(tiles, scales, rows, x.shape[1])
    return fdb_reference.matmul(x, *weight, bias, sum_dtype(x.dtype)).to(x.dtype)


def product_int8(
    values: Tensor,
    steps: Tensor,
    tiles: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """[M, N] of int8 [M, K] and what their integers are worth, float32 [M, g]."""
    if has_kernel(values):
        op = divergence_autograd.kernels().fdb_matmul_int8.default
        return op(values, steps, tiles, scales, bias, rows, dtype)
    x = fdb_reference.numbers(values, steps)
    weight = _planes_and_alpha(tiles, scales, rows, x.shape[1])
    return fdb_reference.matmul(x, *weight, bias, torch.float32).to(dtype)


def quantize(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """int8 [M, K] and steps float32 [M, g] of x [M, K]."""
    if has_kernel(x):
        return divergence_autograd.kernels().fdb_quantize.default(x, groups)
    return fdb_reference.quantize(x, groups)


def dequantize(tiles: Tensor, scales: Tensor, rows: int, columns: int, dtype) -> Tensor:
    """The weight [N, K]."""
    with torch.no_grad():
        if has_kernel(tiles):
            op = divergence_autograd.kernels().fdb_dequantize.default
            return op(tiles, scales, rows, columns, dtype)
        planes, alpha = _planes_and_alpha(tiles, scales, rows, columns)
        return fdb_reference.dequantize(planes, alpha.to(sum_dtype(dtype))).to(dtype)


def gradient(
    upstream: Tensor, x: Tensor, tiles: Tensor, scales: Tensor, want_x: bool, want_scales: bool
) -> tuple[Tensor | None, Tensor | None]:
    """To x in its dtype, and to the scales in that of sums; [0] or None where not wanted."""
    wanted = want_x, want_scales
    if has_kernel(x):
        op = divergence_autograd.kernels().fdb_gradient.default
        return op(upstream, x, tiles, scales, *wanted)
    planes, alpha = _planes_and_alpha(tiles, scales, upstream.shape[1], x.shape[1])
    found = fdb_reference.gradient(upstream, x, planes, alpha, sum_dtype(x.dtype), *wanted)
    d_x, d_alpha = found
    return (
        None if d_x is None else d_x.to(x.dtype),
        None if d_alpha is None else fdb_reference.tile_scales(d_alpha),
    )


def _planes_and_alpha(tiles: Tensor, scales: Tensor, rows: int, columns: int):
    return (
        fdb_reference.untile_planes(tiles, rows, columns),
        fdb_reference.untile_scales(scales, rows),
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tiles, scales, bias, rows):
        ctx.save_for_backward(x, tiles, scales)
        ctx.bias = None if bias is None else bias.dtype
        return _matmul(x, tiles, scales, bias, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        x, tiles, scales = ctx.saved_tensors
        of_x, _, of_scales, of_bias, _ = ctx.needs_input_grad
        d_x = d_scales = d_bias = None
        if of_x or of_scales:
            d_x, d_scales = gradient(upstream, x, tiles, scales, of_x, of_scales)
        if of_bias:
            d_bias = upstream.sum(0, dtype=sum_dtype(x.dtype)).to(ctx.bias)
        return (
            d_x if of_x else None,
            None,
            d_scales.to(scales.dtype) if of_scales else None,
            d_bias,
            None,
        )


def _no_second_derivative(ctx, *upstream):
    raise RuntimeError("products with dual-binary weights have no second derivative")


def register(namespace: str) -> None:
    """Shapes and derivatives of the ops whose schemas csrc/ops.cpp has put into this namespace."""
    fakes = {
        "fdb_matmul": _fake_matmul,
        "fdb_matmul_int8": _fake_matmul_int8,
        "fdb_quantize": _fake_quantize,
        "fdb_dequantize": _fake_dequantize,
        "fdb_gradient": _fake_gradient,
        "in_huge_pages": lambda x: x.new_empty(x.shape),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
    torch.library.register_autograd(f"{namespace}::fdb_gradient", _no_second_derivative)


register("stillhouse")
