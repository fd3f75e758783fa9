"""The registered ops of residual quantization: their shapes for the compiler, and how gradients go.

All ride on one kernel (csrc/rvq).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import divergence_autograd, rvq_reference
from .divergence_autograd import warn_without_kernel

METRICS = ("l2", "cosine")
GRADIENTS = ("ste", "rotation", "rotation_per_stage", "stage_sum", "encodec")
CODES = 64  # in a block of a packed table


def _fake_pack(codebooks, sizes, metric):
    groups, tables, codes, width = codebooks.shape
    return codebooks.new_empty(groups, tables, -(-codes // CODES), width + 1, CODES)


def _fake_encode(x, codebooks, packed, depth, coupling, stages, want_out, want_error, want_margin):
    groups, n, width = x.shape

    def output(wanted, *shape):
        return codebooks.new_empty(shape if wanted else (0,))

    return (
        x.new_empty(groups, n, stages, dtype=torch.int64),
        output(want_out, groups, n, width),
        output(want_error, groups, n, stages),
        output(want_margin, groups, n, stages),
    )


def _fake_candidates(x, codebooks, packed, k, sharpness, seed, node, position):
    shape = (*x.shape[:2], k)
    return x.new_empty(shape, dtype=torch.int64), codebooks.new_empty(shape)


def _fake_decode(codes, codebooks):
    return codebooks.new_empty(*codes.shape[:2], codebooks.shape[3])


def _fake_statistics(x, codes, codebooks):
    return codebooks.new_empty(codebooks.shape[:3]), torch.empty_like(codebooks)


def _fake_gradient(upstream, x, codes, codebooks, want_x, want_codebooks):
    return (
        codebooks.new_empty(x.shape if want_x else (0,)),
        codebooks.new_empty(codebooks.shape if want_codebooks else (0,)),
    )


def has_kernel(x: Tensor) -> bool:
    """Whether the kernels are built for its device; says so where they are not."""
    if divergence_autograd.has_kernel(x):
        return True
    warn_without_kernel(x, "residual quantization")
    return False


def pack(tables: Tensor, metric: str, sizes: Tensor | None) -> Tensor:
    """The tables as the search reads them; of a device without kernels nothing."""
    if not has_kernel(tables):
        return tables.new_empty(0)
    with torch.no_grad():
        op = divergence_autograd.kernels().rvq_pack
        return op(tables.detach(), sizes, METRICS.index(metric))


def encode(call, *, want_out: bool = False, want_margin: bool = False):
    """codes, out, error and margin of a checked call."""
    if not has_kernel(call.x):
        words = call.metric, call.sizes, call.depth, call.stages
        return rvq_reference.encode(call.x, call.tables, *words)
    words = call.packed, call.depth, None, call.stages, want_out, want_out, want_margin
    return divergence_autograd.kernels().rvq_encode(call.x, call.tables, *words)


def encode_coupled(x: Tensor, coupling: Tensor, call) -> tuple[Tensor, Tensor, Tensor]:
    """codes, the codes' numbers [G, N, Q D] and error, of rows in which each stage has columns of
    its own, and coupling [G, Q D, Q D]."""
    if not has_kernel(x):
        words = call.metric, call.sizes, call.depth, call.stages
        return rvq_reference.encode_coupled(x, coupling, call.tables, *words)
    words = call.packed, call.depth, coupling, call.stages, True, True, False
    return divergence_autograd.kernels().rvq_encode(x, call.tables, *words)[:3]


def candidates(
    x: Tensor,
    table: Tensor,
    packed: Tensor,
    k: int,
    *,
    metric: str,
    sizes: Tensor | None,
    sharpness: float = 0.0,
    seed: int = 0,
    node: int = 0,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """k codes of each row, and their squared distances, [G, N, k], from a table [G, 1, K, D]."""
    noise = sharpness, seed, node, position
    if not has_kernel(x):
        return rvq_reference.candidates(x, table, k, metric, sizes, *noise)
    return divergence_autograd.kernels().rvq_candidates(x, table, packed, k, *noise)


def decode(codes: Tensor, tables: Tensor) -> Tensor:
    """The sum of the codes."""
    if not has_kernel(tables):
        return rvq_reference.decode(codes, tables)
    return divergence_autograd.kernels().rvq_decode(codes.contiguous(), tables)


def statistics(x: Tensor, codes: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of each code, and sums of what it stands for."""
    if not has_kernel(x):
        return rvq_reference.statistics(x, codes, tables)
    return divergence_autograd.kernels().rvq_statistics(x, codes, tables)


def gradient(upstream, x, codes, tables, want_x, want_tables):
    words = upstream.contiguous(), x, codes, tables, want_x, want_tables
    if not has_kernel(x):
        return rvq_reference.gradient(*words)
    return divergence_autograd.kernels().rvq_gradient(*words)


class Quantize(torch.autograd.Function):
    """codes, out and the squared distances after each stage; the last two have gradients."""

    @staticmethod
    def forward(ctx, call, mode, x, tables):
        """The tensors of `call` are for autograd to see."""
        if call.codes is None:
            codes, out, error, _ = encode(call, want_out=True)
        else:
            codes = call.codes.masked_fill(call.beyond, -1)
            out, error = decode(codes, tables), rvq_reference.errors(x, codes, tables)
        ctx.save_for_backward(x, tables, codes, out)
        ctx.mode, ctx.partial = mode, call.depth is not None
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)
        return codes, out, error

    @staticmethod
    def backward(ctx, _, d_out, d_error):
        x, tables, codes, out = ctx.saved_tensors
        of_x, of_tables = ctx.needs_input_grad[2:]
        d_x = d_tables = None
        if of_x and d_out is not None:
            d_x = _through(ctx.mode, d_out, x, tables, codes, out)
            if ctx.partial:
                # A row without a stage is 0, whatever it was.
                d_x = torch.where(codes[..., :1] >= 0, d_x, 0)
        if d_error is not None:
            words = x, codes, tables
            if ctx.mode == "encodec" and of_x:
                # Later residuals are of a straight-through output: their derivative to x is 0.
                first = torch.cat([d_error[..., :1], torch.zeros_like(d_error[..., 1:])], -1)
                added, _ = gradient(first, *words, True, False)
                _, d_tables = gradient(d_error, *words, False, of_tables)
            else:
                added, d_tables = gradient(d_error, *words, of_x, of_tables)
            if of_x:
                d_x = added if d_x is None else d_x + added
            d_tables = d_tables if of_tables else None
        return None, None, None if d_x is None else d_x.to(x.dtype), d_tables


class Decode(torch.autograd.Function):
    """Sums of codes; the gradient goes to the tables."""

    @staticmethod
    def forward(ctx, codes, tables):
        ctx.save_for_backward(codes)
        ctx.shape = tables.shape
        return decode(codes, tables)

    @staticmethod
    def backward(ctx, d_out):
        (codes,) = ctx.saved_tensors
        groups, count, size, width = ctx.shape
        stage = torch.arange(codes.shape[-1], device=codes.device).clamp(max=count - 1)
        group = torch.arange(groups, device=codes.device)[:, None, None]
        place = ((group * count + stage) * size + codes.clamp(min=0)).flatten()
        # Where there is no code 0 is added: to leave such rows out would make an accelerator wait.
        rows = torch.where(codes[..., None] >= 0, d_out[:, :, None], 0).reshape(-1, width)
        flat = d_out.new_zeros(groups * count * size, width)
        return None, flat.index_add_(0, place, rows).view(ctx.shape)


def _through(mode: str, d_out: Tensor, x: Tensor, tables: Tensor, codes: Tensor, out: Tensor):
    """What a gradient of the output is to the input, by the mode."""
    if mode == "stage_sum":
        return d_out * (codes >= 0).sum(-1, keepdim=True)
    if mode == "rotation":
        return rotated_gradient(d_out, x.to(out.dtype), out)
    if mode != "rotation_per_stage":
        return d_out
    residual, total = x.to(out.dtype), torch.zeros_like(d_out)
    for stage in range(codes.shape[-1]):
        number, of_stage = min(stage, tables.shape[1] - 1), codes[..., stage, None]
        code = decode(of_stage, tables[:, number : number + 1])
        total = total + (of_stage >= 0) * rotated_gradient(d_out, residual, code)
        residual = residual - code
    return total


def rotated_gradient(d_out: Tensor, x: Tensor, q: Tensor) -> Tensor:
    """lambda R^T d_out of the rotation R that takes x's direction to q's, lambda = |q| / |x|.

    Where the two are opposite, or one is zero, there is no such rotation: the gradient passes.
    """
    of_x, of_q = x.norm(dim=-1, keepdim=True), q.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(x.dtype).tiny
    x_hat, q_hat = x / of_x.clamp(min=tiny), q / of_q.clamp(min=tiny)
    w = x_hat + q_hat
    length = w.norm(dim=-1, keepdim=True)
    w = w / length.clamp(min=tiny)
    along = (w * d_out).sum(-1, keepdim=True)
    turned = d_out - 2 * along * w + 2 * (q_hat * d_out).sum(-1, keepdim=True) * x_hat
    known = (of_x > tiny) & (of_q > tiny) & (length > 1e-6)
    return torch.where(known, of_q / of_x.clamp(min=tiny) * turned, d_out)


def _no_second_derivative(ctx, *upstream):
    raise RuntimeError("squared distances of rvq have no second derivative")


def register(namespace: str) -> None:
    """Shapes and derivatives of the ops whose schemas csrc/ops.cpp has put into this namespace."""
    fakes = {
        "rvq_pack": _fake_pack,
        "rvq_encode": _fake_encode,
        "rvq_candidates": _fake_candidates,
        "rvq_decode": _fake_decode,
        "rvq_statistics": _fake_statistics,
        "rvq_gradient": _fake_gradient,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
    torch.library.register_autograd(f"{namespace}::rvq_gradient", _no_second_derivative)


register("stillhouse")
