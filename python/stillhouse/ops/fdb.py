"""Products with dual-binary weights: two planes of bits and two scales a group of columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import fdb_reference
from .divergence_arguments import DTYPES

_NAMES = "float32, bfloat16, float16 or float64"


@dataclass(frozen=True, eq=False)
class FDBPacked:
    """A weight [N, K] as `fdb_matmul` reads it.

    planes: int32 [2, N, ceil(K / 32)]; bit k % 32 of word k // 32 is column k's, the lowest bit
    first, zeros beyond K (torch's uint32 has no shifts). alpha: [2, N, K / G], float16 or any other
    float dtype, of groups of G columns. columns: K.
    Raises ValueError or TypeError for parts that do not fit together.
    """

    planes: Tensor
    alpha: Tensor
    columns: int

    def __post_init__(self) -> None:
        planes, alpha = self.planes, self.alpha
        if planes.dtype != torch.int32:
            raise TypeError(f"planes are words of int32, got {planes.dtype}: fdb_pack makes them")
        if alpha.dtype not in DTYPES:
            raise TypeError(f"alpha must be {_NAMES}, got {alpha.dtype}")
        if planes.device != alpha.device:
            raise ValueError(f"planes are on {planes.device}, alpha on {alpha.device}")
        words = -(-self.columns // fdb_reference.WORD)
        if planes.dim() != 3 or planes.shape[0] != 2 or planes.shape[2] != words:
            raise ValueError(
                f"planes of {self.columns} columns must be [2, N, {words}], got "
                f"{tuple(planes.shape)}"
            )
        _check_scales(alpha, planes.shape[1], self.columns)

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        return self.planes.shape[1], self.columns

    @property
    def group_size(self) -> int:
        """G."""
        return self.columns // self.alpha.shape[2]


def _check_scales(alpha: Tensor, rows: int, columns: int) -> None:
    if alpha.dim() != 3 or alpha.shape[:2] != (2, rows):
        raise ValueError(f"alpha must be [2, {rows}, K / G], got {tuple(alpha.shape)}")
    groups = alpha.shape[2]
    if groups == 0 or columns % groups:
        raise ValueError(f"{columns} columns cannot be split into the {groups} groups of alpha")


def fdb_pack(planes: Tensor, alpha: Tensor) -> FDBPacked:
    """The weight alpha_1 b_1 + alpha_2 b_2 with its bits in words of 32.

    planes: bool [2, N, K], b_1 and b_2. alpha: [2, N, K / G], finite; kept as it is.
    Raises ValueError for shapes that do not fit or scales that are not finite, TypeError for
    planes that are not bool.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> planes = torch.tensor([[[True, False, True, True]], [[False, False, True, False]]])
        >>> packed = ops.fdb_pack(planes, torch.tensor([[[2.0]], [[-1.0]]]))
        >>> packed.planes.tolist()
        [[[13]], [[4]]]
        >>> ops.fdb_matmul(torch.eye(4), packed).T
        tensor([[2., 0., 1., 2.]])
    """
    if planes.dtype != torch.bool:
        raise TypeError(f"planes are bits, bool [2, N, K], got {planes.dtype}")
    if planes.dim() != 3 or planes.shape[0] != 2:
        raise ValueError(f"planes must be [2, N, K], got {tuple(planes.shape)}")
    _check_scales(alpha, *planes.shape[1:])
    if not alpha.isfinite().all():
        raise ValueError("alpha has numbers that are not finite")
    return FDBPacked(fdb_reference.pack(planes), alpha, planes.shape[2])


def fdb_unpack(packed: FDBPacked) -> tuple[Tensor, Tensor]:
    """planes bool [2, N, K] and alpha [2, N, K / G]: what `fdb_pack` was given."""
    return fdb_reference.unpack(packed.planes, packed.columns), packed.alpha


def fdb_matmul(x: Tensor, packed: FDBPacked, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with W = alpha_1 b_1 + alpha_2 b_2.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; no rows are legal.
        packed: a weight [N, K].
        bias: [N] or None, any of these dtypes.

    Returns:
        [..., N] in the dtype of x; summed in float32, or float64 where x is.

    Gradients flow to x, to `packed.alpha` with the planes held fixed, and to the bias.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: a dtype outside the list, or a weight that is not packed.
        RuntimeError: a second derivative.

    Example: see `fdb_pack`.
    """
    if not isinstance(packed, FDBPacked):
        raise TypeError(f"expected a weight of fdb_pack, got {type(packed).__name__}")
    for name, each in (("x", x), ("bias", bias)):
        if each is None:
            continue
        if each.dtype not in DTYPES:
            raise TypeError(f"{name} must be {_NAMES}, got {each.dtype}")
        if each.device != packed.planes.device:
            raise ValueError(f"{name} is on {each.device}, the weight on {packed.planes.device}")
    rows, columns = packed.shape
    if x.dim() < 1 or x.shape[-1] != columns:
        raise ValueError(f"x must be [..., {columns}], got {tuple(x.shape)}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias must be [{rows}], got {tuple(bias.shape)}")
    flat = x.reshape(x.shape[:-1].numel(), columns)
    y = _Product.apply(flat, packed.planes, packed.alpha, bias)
    return y.view(*x.shape[:-1], rows)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _matmul(x: Tensor, planes: Tensor, alpha: Tensor, bias: Tensor | None) -> Tensor:
    """[M, N] in the dtype of x [M, K]."""
    return fdb_reference.matmul(x, planes, alpha, bias, _sum_dtype(x)).to(x.dtype)


def _gradient(
    upstream: Tensor, x: Tensor, planes: Tensor, alpha: Tensor, want_x: bool, want_alpha: bool
) -> tuple[Tensor | None, Tensor | None]:
    """To x and to alpha, in the dtype that is summed in."""
    wanted = want_x, want_alpha
    return fdb_reference.gradient(upstream, x, planes, alpha, _sum_dtype(x), *wanted)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, planes, alpha, bias):
        ctx.save_for_backward(x, planes, alpha)
        ctx.bias = None if bias is None else bias.dtype
        return _matmul(x, planes, alpha, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        x, planes, alpha = ctx.saved_tensors
        of_x, _, of_alpha, of_bias = ctx.needs_input_grad
        d_x = d_alpha = d_bias = None
        if of_x or of_alpha:
            d_x, d_alpha = _gradient(upstream, x, planes, alpha, of_x, of_alpha)
        if of_bias:
            d_bias = upstream.sum(0, dtype=_sum_dtype(x)).to(ctx.bias)
        return (
            None if d_x is None else d_x.to(x.dtype),
            None,
            None if d_alpha is None else d_alpha.to(alpha.dtype),
            d_bias,
        )
