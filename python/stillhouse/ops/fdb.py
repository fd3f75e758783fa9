"""Products with dual-binary weights: two planes of bits and two scales a group of columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import fdb_autograd, fdb_reference
from .divergence_arguments import DTYPES

_NAMES = "float32, bfloat16, float16 or float64"


@dataclass(frozen=True, eq=False)
class FDBPacked:
    """A weight [N, K] in groups of G columns, g = K / G, as `fdb_matmul` reads it.

    tiles: int32 [ceil(N / 16), g, ceil(G / 32), 2, 16], the bits of 16 rows side by side: bit i of
    word j of a group is its column 32 j + i, the lowest bit first; zeros beyond G, and in rows
    beyond N. scales: [ceil(N / 16), g, 2, 16], float16 or any other float dtype; zeros beyond N.
    rows, columns: N, K. `fdb_pack` makes one of bits, `from_words` of the words of a file.
    Raises ValueError or TypeError for parts that do not fit together.
    """

    tiles: Tensor
    scales: Tensor
    rows: int
    columns: int

    def __post_init__(self) -> None:
        tiles, scales = self.tiles, self.scales
        if tiles.dtype != torch.int32:
            raise TypeError(f"tiles are words of int32, got {tiles.dtype}: fdb_pack makes them")
        _check_float("scales", scales)
        if tiles.device != scales.device:
            raise ValueError(f"tiles are on {tiles.device}, scales on {scales.device}")
        if tiles.dim() != 5 or tiles.shape[1] == 0 or self.columns % tiles.shape[1]:
            raise ValueError(
                f"tiles must be [ceil(N / 16), g, ceil(G / 32), 2, 16] with {self.columns} columns "
                f"in g groups, got {tuple(tiles.shape)}"
            )
        blocks, groups = -(-self.rows // fdb_reference.BLOCK), tiles.shape[1]
        words = -(-self.columns // groups // fdb_reference.WORD)
        shapes = {
            "tiles": (tiles, (blocks, groups, words, 2, fdb_reference.BLOCK)),
            "scales": (scales, (blocks, groups, 2, fdb_reference.BLOCK)),
        }
        for name, (part, shape) in shapes.items():
            if part.shape != shape:
                raise ValueError(
                    f"{name} of {self.rows} rows and {self.columns} columns in {groups} groups "
                    f"must be {list(shape)}, got {tuple(part.shape)}"
                )

    @classmethod
    def from_words(cls, planes: Tensor, alpha: Tensor, columns: int) -> FDBPacked:
        """A weight of K columns whose planes are int32 [2, N, ceil(K / 32)]: bit k % 32 of word
        k // 32 is column k's, the lowest bit first (torch's uint32 has no shifts); what lies beyond
        K does not count. alpha: [2, N, g]; gradients flow to it. Errors as above."""
        if planes.dtype != torch.int32:
            raise TypeError(f"planes are words of int32, got {planes.dtype}: fdb_pack makes them")
        words = -(-columns // fdb_reference.WORD)
        if planes.dim() != 3 or planes.shape[0] != 2 or planes.shape[2] != words:
            raise ValueError(
                f"planes of {columns} columns must be [2, N, {words}], got {tuple(planes.shape)}"
            )
        _check_alpha(alpha, planes, columns)
        tiles = fdb_reference.tile_words(planes, alpha.shape[2], columns)
        scales = fdb_reference.tile_scales(alpha)
        return cls(fdb_autograd.hold(tiles), scales, planes.shape[1], columns)

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        return self.rows, self.columns

    @property
    def group_size(self) -> int:
        """G."""
        return self.columns // self.tiles.shape[1]

    @property
    def planes(self) -> Tensor:
        """The words that `from_words` takes, made anew; zeros beyond K."""
        return fdb_reference.untile_words(self.tiles, self.rows, self.columns)

    @property
    def alpha(self) -> Tensor:
        """The scales [2, N, g], made anew; differentiable."""
        return fdb_reference.untile_scales(self.scales, self.rows)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K], of levels that are summed in float32 (float64 for that) and rounded
        once. It has no gradient. Raises TypeError for a dtype that is none of the four."""
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be {_NAMES}, got {dtype}")
        return fdb_autograd.dequantize(self.tiles, self.scales, self.rows, self.columns, dtype)


@dataclass(frozen=True, eq=False)
class FDBActivations:
    """Rows of 8 bits, as `fdb_quantize` makes them: an integer of 1 in group j is worth steps[...,
    j].

    values: int8 [..., K]. steps: float32 [..., g]. dtype: of products, float32, bfloat16 or
    float16. Raises ValueError or TypeError for parts that do not fit together.
    """

    values: Tensor
    steps: Tensor
    dtype: torch.dtype

    def __post_init__(self) -> None:
        values, steps = self.values, self.steps
        if values.dtype != torch.int8 or steps.dtype != torch.float32:
            raise TypeError(
                f"values are int8 and steps float32, got {values.dtype} and {steps.dtype}"
            )
        if self.dtype not in DTYPES or self.dtype == torch.float64:
            raise TypeError(f"dtype must be float32, bfloat16 or float16, got {self.dtype}")
        if values.dim() < 1 or steps.shape[:-1] != values.shape[:-1] or steps.dim() < 1:
            raise ValueError(
                f"steps of values {tuple(values.shape)} must have their leading axes, got "
                f"{tuple(steps.shape)}"
            )
        if values.device != steps.device:
            raise ValueError(f"values are on {values.device}, steps on {steps.device}")


def _check_float(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be {_NAMES}, got {x.dtype}")


def _check_alpha(alpha: Tensor, planes: Tensor, columns: int) -> None:
    _check_float("alpha", alpha)
    if alpha.device != planes.device:
        raise ValueError(f"planes are on {planes.device}, alpha on {alpha.device}")
    if alpha.dim() != 3 or alpha.shape[:2] != planes.shape[:2]:
        raise ValueError(f"alpha must be [2, {planes.shape[1]}, K / G], got {tuple(alpha.shape)}")
    groups = alpha.shape[2]
    if groups == 0 or columns % groups:
        raise ValueError(f"{columns} columns cannot be split into the {groups} groups of alpha")


def fdb_pack(planes: Tensor, alpha: Tensor) -> FDBPacked:
    """The weight alpha_1 b_1 + alpha_2 b_2 as kernels read it.

    planes: bool [2, N, K], b_1 and b_2. alpha: [2, N, K / G], finite; its dtype is kept, and
    gradients flow to it.
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
    _check_alpha(alpha, planes, planes.shape[2])
    if not alpha.isfinite().all():
        raise ValueError("alpha has numbers that are not finite")
    tiles = fdb_reference.tile_planes(planes, alpha.shape[2])
    scales = fdb_reference.tile_scales(alpha)
    return FDBPacked(fdb_autograd.hold(tiles), scales, *planes.shape[1:])


def fdb_unpack(packed: FDBPacked) -> tuple[Tensor, Tensor]:
    """planes bool [2, N, K] and alpha [2, N, K / G]: what `fdb_pack` was given."""
    return fdb_reference.untile_planes(packed.tiles, packed.rows, packed.columns), packed.alpha


def fdb_quantize(x: Tensor, group_size: int) -> FDBActivations:
    """Rows of 8 bits: in each group of columns the largest |x| is 127, and the others the nearest
    integers, ties to even. `fdb_matmul` takes them; their products are faster, and not exact.

    x: [..., K], float32, bfloat16 or float16. A group with a number that is not finite has products
    that are NaN. Raises ValueError for K that is no multiple of `group_size` and for x that needs
    a gradient, TypeError for another dtype.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> ops.fdb_quantize(torch.tensor([254.0, -3.0, 127.0, 4.0]), 2).values
        tensor([127,  -2, 127,   4], dtype=torch.int8)
    """
    if x.dtype not in DTYPES or x.dtype == torch.float64:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() < 1 or group_size < 1 or x.shape[-1] == 0 or x.shape[-1] % group_size:
        raise ValueError(
            f"x must be [..., K] in groups of group_size {group_size}, got {tuple(x.shape)}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "int8 activations have no gradient and x needs one: detach it, or use torch.no_grad()"
        )
    groups = x.shape[-1] // group_size
    values, steps = fdb_autograd.quantize(_rows(x), groups)
    return FDBActivations(values.view(x.shape), steps.view(*x.shape[:-1], groups), x.dtype)


def fdb_matmul(x: Tensor | FDBActivations, packed: FDBPacked, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with W = alpha_1 b_1 + alpha_2 b_2.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; no rows are legal. Or what
            `fdb_quantize` has made of them, with groups of the weight's.
        packed: a weight [N, K].
        bias: [N] or None, any of these dtypes.

    Returns:
        [..., N] in the dtype of x; summed in float32, or float64 where x is. Of many rows of 16
        bits, which torch's own products take, the weight is rounded to them. Fewer than 16 rows,
        and any of 8 bits, give the same bits for every number of threads. With rows of 8 bits,
        sums of integers are exact within a group.

    Gradients flow to x, to the scales (of `packed.scales`, or of the alpha that made them) with the
    planes held fixed, and to the bias; rows of 8 bits have none.

    Raises:
        ValueError: shapes or devices that do not fit; a gradient through rows of 8 bits.
        TypeError: a dtype outside the list, or a weight that is not packed.
        RuntimeError: a second derivative.

    Example: see `fdb_pack`.
    """
    if not isinstance(packed, FDBPacked):
        raise TypeError(f"expected a weight of fdb_pack, got {type(packed).__name__}")
    return multiply(x, packed.tiles, packed.scales, packed.rows, packed.columns, bias)


def multiply(
    x: Tensor | FDBActivations,
    tiles: Tensor,
    scales: Tensor,
    rows: int,
    columns: int,
    bias: Tensor | None,
) -> Tensor:
    """`fdb_matmul` with the parts of a packed weight, which are not checked again."""
    of_integers = isinstance(x, FDBActivations)
    numbers = x.values if of_integers else x
    if not of_integers:
        _check_float("x", x)
    if numbers.device != tiles.device:
        raise ValueError(f"x is on {numbers.device}, the weight on {tiles.device}")
    shape = numbers.shape
    if not shape or shape[-1] != columns:
        raise ValueError(f"x must be [..., {columns}], got {tuple(shape)}")
    if bias is not None:
        _check_float("bias", bias)
        if bias.device != tiles.device:
            raise ValueError(f"bias is on {bias.device}, the weight on {tiles.device}")
        if bias.shape != (rows,):
            raise ValueError(f"bias must be [{rows}], got {tuple(bias.shape)}")
    if of_integers:
        y = _multiply_integers(x, tiles, scales, bias, rows)
    else:
        y = fdb_autograd.product(_rows(x), tiles, scales, bias, rows)
    return y if len(shape) == 2 else y.view(*shape[:-1], rows)


def _multiply_integers(x: FDBActivations, tiles, scales, bias, rows) -> Tensor:
    if x.steps.shape[-1] != tiles.shape[1]:
        raise ValueError(
            f"x has {x.steps.shape[-1]} groups, the weight {tiles.shape[1]}: "
            "fdb_quantize with its group_size"
        )
    learns = scales.requires_grad or (bias is not None and bias.requires_grad)
    if learns and torch.is_grad_enabled():
        raise ValueError(
            "products of int8 activations have no gradient, and scales or bias need one: "
            "use torch.no_grad()"
        )
    parts = _rows(x.values), _rows(x.steps), tiles, scales, bias
    return fdb_autograd.product_int8(*parts, rows, x.dtype)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
