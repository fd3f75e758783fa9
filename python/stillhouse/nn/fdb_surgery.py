"""Models whose linear layers become dual-binary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from stillhouse.nn.fdb import FDBLinear
from stillhouse.nn.surgery import replace_modules_
from stillhouse.progress import Progress


class FDBLayer(NamedTuple):
    """A quantized layer: weights, error of them (mean square, and as a share of the weights' own)
    and the share of ones in either plane."""

    path: str
    weights: int
    mse: float
    relative_error: float
    density: tuple[float, float]


class FDBReport(NamedTuple):
    """What `quantize_fdb_` has done. Bits are those of the quantized weights, bytes those of all
    parameters, packed."""

    layers: list[FDBLayer]
    bits_per_weight: float
    bytes_before: int
    bytes_after: int


def quantize_fdb_(
    model: nn.Module,
    group_size: int = 64,
    *,
    skip: Sequence[str] = ("lm_head", "embed"),
    method: str = "ls",
    train_latent: bool = False,
    gradient: str = "planes",
) -> FDBReport:
    """Put an `FDBLinear` in the place of every `nn.Linear`, in place.

    Layers whose path has one of the words of `skip` in it stay as they are; so do subclasses of
    `nn.Linear`, embeddings and norms. method, train_latent, gradient: as in
    `FDBLinear.from_linear`. `train_only(model, "*.change")` lets the scales alone learn;
    `freeze_fdb_` ends it.

    Raises ValueError where no layer is left, for a layer with columns that are no multiple of
    `group_size`, weights that are not finite, a weight that is shared with another module (a tied
    head), and a model that `fully_shard` has sharded: the model is then what it was.

    Defaults: groups of 64, heads and embeddings at full precision (paper); scales from least
    squares (ours: "paper" takes half of the largest weight).

    Example:
        >>> from torch import nn
        >>> from stillhouse.methods.compression import quantize_fdb_
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64))
        >>> report = quantize_fdb_(model, group_size=32)
        >>> [layer.path for layer in report.layers], report.bits_per_weight
        (['0', '2'], 3.0)
        >>> model[0]
        FDBLinear(in_features=64, out_features=32, bias=True, group_size=32, frozen=False)
    """
    _require_whole(model, "quantize it before fully_shard")
    words = [skip] if isinstance(skip, str) else list(skip)

    def wanted(path: str, module: nn.Module) -> bool:
        return type(module) is nn.Linear and not any(word in path for word in words)

    found = {path: module for path, module in model.named_modules() if wanted(path, module)}
    if "" in found:
        raise ValueError("the model is a linear layer itself: FDBLinear.from_linear makes another")
    users: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), set()).add(id(module))
    for path, module in found.items():
        if len(users[id(module.weight)]) > 1:
            raise ValueError(f"{path} shares its weight with another module: name it in skip")
    # All are made before the first is put in: an error leaves the model whole.
    made: dict[int, FDBLinear] = {}
    layers, said = [], Progress("layers")
    options = {"train_latent": train_latent, "gradient": gradient}
    for number, (path, module) in enumerate(found.items(), start=1):
        try:
            layer = FDBLinear.from_linear(module, group_size, method, **options)
        except ValueError as error:
            raise ValueError(f"{path}: {error} (skip= leaves a layer as it is)") from error
        made[id(module)] = layer
        layers.append(_row(path, module, layer))
        said("dual-binary", number, len(found))
    _, before = packed_size(model)
    replace_modules_(model, wanted, lambda path, module: made[id(module)])
    return FDBReport(layers, 2 + 32 / group_size, before, packed_size(model)[1])


def freeze_fdb_(model: nn.Module, activations: str | None = None) -> int:
    """`FDBLinear.freeze` of all of a model, in place; returns how many there are.

    Raises ValueError for such layers in a model that `fully_shard` has sharded, and for scales that
    have become infinite."""
    layers = [module for module in model.modules() if isinstance(module, FDBLinear)]
    if layers:
        _require_whole(model, "load its full state dict into one that is not, and freeze that")
    for layer in layers:
        layer.freeze(activations)
    return len(layers)


def has_fdb(model: nn.Module) -> bool:
    """Whether a model has an `FDBLinear`."""
    return any(isinstance(module, FDBLinear) for module in model.modules())


def packed_size(model: nn.Module) -> tuple[int, int]:
    """Number of weights, and bytes of them, dual-binary layers packed; what is shared counts once.
    Buffers do not count."""
    dense = {}
    weights = size = 0
    for module in model.modules():
        own = module.parameters(recurse=False)
        if isinstance(module, FDBLinear):
            words = -(-module.in_features // 32)
            scales = module.in_features // module.group_size
            weights += module.out_features * module.in_features
            size += 2 * module.out_features * (4 * words + 2 * scales)
            own = [] if module.bias is None else [module.bias]
        dense |= {id(each): each for each in own}
    weights += sum(each.numel() for each in dense.values())
    return weights, size + sum(each.numel() * each.element_size() for each in dense.values())


def _require_whole(model: nn.Module, instead: str) -> None:
    # Between a forward and a backward the weights of a sharded model may look whole.
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        if any(isinstance(module, FSDPModule) for module in model.modules()):
            raise ValueError(f"the model is sharded: {instead}")


def _row(path: str, module: nn.Linear, layer: FDBLinear) -> FDBLayer:
    with torch.no_grad():
        fdb, weight = layer.quantized(), module.weight.float()
        mse = (fdb.dequantize() - weight).square().mean().item()
        power = weight.square().mean().item()
    share = mse / power if power else 0.0
    return FDBLayer(path, weight.numel(), mse, share, tuple(fdb.density().tolist()))
