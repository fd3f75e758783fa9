"""Linear layers for the few rows of a tree: float32 products on a CPU, the other way round."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

MOST_ROWS = 16  # above, both ways take as long


@contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """Within it the model's float32 linear layers on a CPU compute (W x^T)^T for up to 16 rows.

    torch hands x W^T to MKL, which takes twice as long for a single row, and 1.5 to 5 times as long
    for two to eight, as it does for W x^T (two cores of an AMD EPYC, weights from memory), although
    the weights are read once either way. Products differ in the last bit. Layers of another class,
    with a forward of their own or of other dtypes are left alone; afterwards all are as they were.
    """
    changed = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and "forward" not in layer.__dict__
        and layer.weight.dtype == torch.float32
        and layer.weight.is_cpu
    ]
    for layer in changed:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    rows = x.numel() // x.shape[-1]
    if not 1 <= rows <= MOST_ROWS or x.dtype != torch.float32 or not x.is_cpu:
        return linear(x, layer.weight, layer.bias)
    columns = x.reshape(rows, -1)
    if rows == 1:  # one column is a matrix times a vector, for which MKL is the slow one
        columns = columns.repeat(2, 1)
    product = torch.mm(layer.weight, columns.t())[:, :rows].t()
    if layer.bias is not None:
        product = product + layer.bias
    return product.reshape(*x.shape[:-1], -1).contiguous()
