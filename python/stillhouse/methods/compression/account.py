"""What a model costs: weights, bits, bytes, and multiplications of a token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from stillhouse.nn.fdb import FDBLinear
from stillhouse.nn.fdb_surgery import packed_size
from stillhouse.train.forward import evaluating


class Account(NamedTuple):
    """What `account` has found.

    params: number of weights, a weight that is shared once. bytes: of them as they are stored,
    dual-binary layers packed whether they train or are frozen. bits_per_weight: 8 bytes / params,
    embeddings and heads included. macs: multiply-accumulates of one forward, or None.
    """

    params: int
    bits_per_weight: float
    bytes: int
    macs: int | None


def account(model: nn.Module, inputs: Tensor | tuple | Mapping[str, Any] | None = None) -> Account:
    """Count a model's weights, bits, bytes and the multiply-accumulates of a forward.

    Every layer counts as what it is: an embedding has weights and no products, a head has both,
    a dual-binary layer [N, K] in groups of G has N K weights of 2 + 32 / G bits (K a multiple of
    32) and, for M rows, the M N K products of the dense layer it stands for. Buffers do not count.
    inputs: what the model is called with (a tensor, a tuple of arguments, or a mapping of named
    ones); None is one token of a causal language model, and no products for any other model.
    Products are those that torch's `FlopCounterMode` finds (matrices, convolutions, attention,
    whose masked pairs count), two operations each. The forward runs in evaluation mode without
    gradients; the model is unchanged.

    Raises ValueError for a model without parameters.

    Defaults: one token (ours).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillhouse.methods.compression import account, quantize_fdb_
        >>> model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 8, bias=False))
        >>> account(model, torch.randn(3, 64))
        Account(params=2304, bits_per_weight=32.0, bytes=9216, macs=6912)
        >>> report = quantize_fdb_(model, group_size=32)
        >>> account(model, torch.randn(3, 64))
        Account(params=2304, bits_per_weight=3.0, bytes=864, macs=6912)
    """
    params, size = packed_size(model)
    if not params:
        raise ValueError(f"{type(model).__name__} has no weights to count")
    return Account(params, 8 * size / params, size, _macs(model, inputs))


def _macs(model: nn.Module, inputs: Any) -> int | None:
    if inputs is None:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if embedding is None or head is None:
            return None
        inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64, device=head.weight.device)}
    positional = () if isinstance(inputs, Mapping) else inputs
    positional = (positional,) if isinstance(positional, Tensor) else positional
    named = inputs if isinstance(inputs, Mapping) else {}
    # The attention of a CPU is not in the counter's list; what it is made of is.
    counting = FlopCounterMode(display=False)
    with evaluating(model), _dense(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counting:
        model(*positional, **named)
    return counting.get_total_flops() // 2


@contextmanager
def _dense(model: nn.Module) -> Iterator[None]:
    """Dual-binary layers multiply by zeros of their size within: the counter knows that."""
    layers = [module for module in model.modules() if isinstance(module, FDBLinear)]

    def stand_in(layer: FDBLinear) -> Any:
        def forward(x: Tensor) -> Tensor:
            return linear(x, x.new_zeros(1, 1).expand(layer.out_features, layer.in_features))

        return forward

    for layer in layers:
        layer.forward = stand_in(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
