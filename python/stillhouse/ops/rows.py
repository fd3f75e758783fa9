"""What every quantizer asks of its rows [..., D], and of what is said about each of them."""

from __future__ import annotations

import torch
from torch import Tensor


def check_floats(x: Tensor) -> None:
    """Rows are float tensors."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a float tensor, got {getattr(x, 'dtype', type(x))}")


def of_rows(name: str, given: Tensor, x: Tensor) -> Tensor:
    """What broadcasts to the rows, in their shape."""
    try:
        return given.expand(x.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"{name} must have the rows' shape {tuple(x.shape[:-1])}, got {tuple(given.shape)}"
        ) from None


def mask_of_rows(mask: Tensor, x: Tensor) -> Tensor:
    """A mask in the rows' shape."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    return of_rows("mask", mask, x)


def check_depth(depth: Tensor, most: int) -> None:
    """Numbers of quantizers from 0; their range is checked on the CPU alone, where that does not
    wait for a device."""
    if depth.is_floating_point() or depth.dtype == torch.bool:
        raise TypeError(f"num_quantizers must be an int or int64, got {depth.dtype}")
    if depth.is_cpu and not torch.compiler.is_compiling() and depth.numel():
        low, high = int(depth.min()), int(depth.max())
        if low < 0 or high > most:
            raise ValueError(f"num_quantizers must be from 0 to {most}, got {low} to {high}")


def depth_of_rows(depth: Tensor, x: Tensor, most: int) -> Tensor:
    """Numbers of quantizers in the rows' shape."""
    check_depth(depth, most)
    return of_rows("num_quantizers", depth, x).long()
