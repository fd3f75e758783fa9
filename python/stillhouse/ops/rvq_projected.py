"""Residual quantization whose stages search in narrow spaces of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from . import rvq_autograd
from .rows import check_floats, mask_of_rows
from .rvq import Call, ResidualCodes

Linear = tuple[Tensor, Tensor | None]
GRADIENTS = ("ste", "stage_sum")


def projected_rvq(
    x: Tensor,
    codebooks: Tensor,
    into: Linear,
    out_of: Linear,
    *,
    grad: str = "ste",
    metric: str = "cosine",
    num_quantizers: int | Tensor | None = None,
    mask: Tensor | None = None,
    sizes: Tensor | None = None,
    packed: Tensor | None = None,
) -> ResidualCodes:
    """Rows quantized stage by stage through linear maps into a narrow space and out of it.

    Stage s takes the code c_s nearest to z_s = A_s r_s + a_s, and r_(s+1) = r_s - (B_s c_s + b_s):
    the quantizer of the Descript Audio Codec (arXiv 2306.06546, section 3.2). The residuals r are
    never formed: z = A x + a - (A B) c, whose products of later and earlier stages are d x d.

    Args:
        x: rows [..., D], float32, bfloat16, float16 or float64.
        codebooks: [Q, K, d], or [K, d] expanded to it; float64 where x is.
        into: weight A [Q, d, D] and bias a [Q, d] or None.
        out_of: weight B [Q, D, d] and bias b [Q, D] or None.
        grad: "ste": a code's derivative to its z is the identity, also in what it takes off the
            stages that follow; out's to x is then I - prod_s (I - B_s A_s). "stage_sum": later
            stages see earlier codes as constants; out's to x is sum_s B_s A_s.
        metric, num_quantizers, mask, sizes, packed: as in `rvq`.

    Returns:
        out [..., D], codes int64 [..., Q], error [..., Q] = |z_s - c_s|^2. Everything is
        differentiable: out to x, A, a, B, b; error to those and, with z fixed, to the codebooks.

    Raises:
        ValueError: shapes, ranges or devices that do not fit, an unknown grad.
        TypeError: dtypes as in `rvq_encode`.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> tables = torch.tensor([[[2.5], [-1.0]], [[1.0], [4.0]]])
        >>> into = torch.eye(2)[:, None], None  # stage 0 sees the first number, stage 1 the second
        >>> out_of = torch.eye(2)[:, :, None], None
        >>> found = ops.projected_rvq(x, tables, into, out_of, metric="l2")
        >>> found.out, found.codes
        (tensor([[2.5000, 4.0000]]), tensor([[0, 1]]))
    """
    if grad not in GRADIENTS:
        raise ValueError(f"grad must be one of {', '.join(GRADIENTS)}, got {grad!r}")
    check_floats(x)
    if not isinstance(codebooks, Tensor) or codebooks.dim() != 3:
        raise ValueError(
            f"codebooks must be [Q, K, d], got {tuple(getattr(codebooks, 'shape', ()))}"
        )
    stages, _, narrow = codebooks.shape
    wide = x.shape[-1] if x.dim() else 0
    _check("into", into, (stages, narrow, wide))
    _check("out_of", out_of, (stages, wide, narrow))
    if isinstance(num_quantizers, int) and 1 <= num_quantizers <= stages:
        stages = num_quantizers
    rows = x.reshape(-1, wide)
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    for name, (weight, _) in (("into", into), ("out_of", out_of)):
        if weight.dtype != rows.dtype:
            raise TypeError(f"{name} must be {rows.dtype} for x of {x.dtype}, got {weight.dtype}")
    if mask is not None:
        # NaN times a gradient of 0 would reach the weights.
        rows = torch.where(mask_of_rows(mask, x).reshape(-1, 1), rows, 0)
    # Codes are those of the rows' own precision, whatever autocast makes of the layers around.
    with torch.autocast(x.device.type, enabled=False):
        z, coupling, back = _narrow(rows, into, out_of, stages, grad)
        # The checks and the depth of `rvq`, of rows that are as wide as codes.
        like = z.detach()[:, :narrow].reshape(*x.shape[:-1], narrow)
        call = Call(like, codebooks, metric, num_quantizers, mask, sizes, packed)
        codes, taken, error = Coupled.apply(call, grad, z[None], coupling[None], call.tables)
        if out_of[1] is None:
            out = taken.squeeze(0) @ back
        elif call.depth is None:
            out = torch.addmm(out_of[1][:stages].sum(0), taken.squeeze(0), back)
        else:
            deep = (codes[0] >= 0).to(back.dtype)
            out = torch.addmm(deep @ out_of[1][:stages], taken.squeeze(0), back)
    return ResidualCodes(out.view(*x.shape), call.shaped(codes), call.shaped(error))


def _narrow(
    rows, into: Linear, out_of: Linear, stages: int, grad: str
) -> tuple[Tensor, Tensor, Tensor]:
    """z [N, Q d] before any code is taken, what each number of the codes takes off each number of
    later stages [Q d, Q d], and the way back [Q d, D]."""
    narrow, wide = into[0].shape[1:]
    weight = into[0][:stages].reshape(-1, wide)
    back = out_of[0][:stages].transpose(1, 2).reshape(-1, wide)
    stage = torch.arange(stages, device=rows.device).repeat_interleave(narrow)
    taken = back.detach() if grad == "stage_sum" else back
    coupling = (taken @ weight.T) * (stage[:, None] < stage)
    offset = rows.new_zeros(stages, narrow) if into[1] is None else into[1][:stages]
    if out_of[1] is not None:
        before = out_of[1][:stages].cumsum(0) - out_of[1][:stages]
        before = before.detach() if grad == "stage_sum" else before
        offset = offset - torch.einsum("qdw,qw->qd", into[0][:stages], before)
    z = torch.addmm(offset.reshape(-1), rows, weight.T)
    return z, coupling, back


def _check(name: str, linear: Linear, shape: tuple[int, int, int]) -> None:
    weight, bias = linear
    if weight.shape != shape or (bias is not None and bias.shape != shape[:2]):
        of_bias = None if bias is None else tuple(bias.shape)
        raise ValueError(
            f"{name} must be a weight {shape} and a bias {shape[:2]} or None, got "
            f"{tuple(weight.shape)} and {of_bias}"
        )


class Coupled(torch.autograd.Function):
    """codes [1, N, Q], the codes' numbers [1, N, Q d] and errors of z [1, N, Q d]."""

    @staticmethod
    def forward(ctx, call, mode, z, coupling, tables):
        """The tensors of `call` are for autograd to see."""
        codes, taken, error = rvq_autograd.encode_coupled(z, coupling, call)
        ctx.save_for_backward(z, coupling, tables, codes, taken)
        ctx.mode = mode
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)
        return codes, taken, error

    @staticmethod
    def backward(ctx, _, d_taken, d_error):
        z, coupling, tables, codes, taken = ctx.saved_tensors
        n, stages = codes.shape[1:]
        narrow = tables.shape[-1]

        def by_stage(of_rows, width):
            return of_rows.view(n, stages, width).transpose(0, 1)

        d_z, d_tables = torch.zeros_like(z), None
        if d_taken is not None:
            d_z = d_taken * (codes >= 0).to(z.dtype).repeat_interleave(narrow, -1)
        if d_error is not None:
            # Each stage is a quantizer of its own here, of rows that are known.
            seen = by_stage((z - taken @ coupling)[0], narrow).contiguous()
            of_stage = tables[0, :stages].expand(stages, *tables.shape[2:])[:, None]
            slope, d_tables = rvq_autograd.gradient(
                by_stage(d_error[0], 1), seen, by_stage(codes[0], 1), of_stage, True, True
            )
            d_z = d_z + slope.transpose(0, 1).reshape_as(z)
            d_tables = d_tables.transpose(0, 1)
            if tables.shape[1] == 1:
                d_tables = d_tables.sum(1, keepdim=True)
            elif stages < tables.shape[1]:
                unused = d_tables.new_zeros(1, tables.shape[1] - stages, *tables.shape[2:])
                d_tables = torch.cat([d_tables, unused], 1)
        if ctx.mode == "ste":
            # A code passes on what its z gets, so z's derivatives solve d_z + d_z coupling^T = d_z.
            unit = torch.eye(coupling.shape[-1], dtype=z.dtype, device=z.device)
            d_z = torch.linalg.solve_triangular(
                unit + coupling.mT, d_z, upper=False, left=False, unitriangular=True
            )
        return None, None, d_z, -(taken.mT @ d_z), d_tables
