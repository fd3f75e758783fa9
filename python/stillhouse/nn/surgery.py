"""Cutting models: which blocks a model has, and a smaller model made of some of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The module path and the list of the model's transformer blocks.

    With a `transformers` configuration it is the one list as long as `num_hidden_layers`, else
    the longest `nn.ModuleList` that is not inside another one. Raises ValueError where there is
    none, or more than one candidate (an encoder-decoder: pass the half that is meant).
    """
    lists = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)
    }
    # A list inside a block (experts, heads) is not the stack of blocks.
    outer = {
        path: module
        for path, module in lists.items()
        if not any(path.startswith(other + ".") for other in lists)
    }
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if depth is None:
        depth = max(map(len, outer.values()), default=0)
    found = [(path, module) for path, module in outer.items() if len(module) == depth]
    if len(found) != 1:
        names = ", ".join(path for path, _ in found) or "none"
        raise ValueError(
            f"expected one list of {depth} blocks in {type(model).__name__}, found {names}: "
            "pass the submodule whose blocks are meant"
        )
    return found[0]


def take_layers(model: nn.Module, layers: Sequence[int]) -> nn.Module:
    """A copy of `model` with only the blocks `layers` (0-based, in this order, repeats allowed).

    Everything outside the blocks is copied too, tied weights stay tied, `layer_idx` is renumbered
    and the configuration says the new depth, so `save_pretrained` gives an ordinary model. Memory:
    the copy only; dropped blocks are never duplicated. Raises ValueError for an empty list and for
    a block that does not exist.
    """
    _, stack = blocks(model)
    layers = list(layers)
    if not layers:
        raise ValueError("no layer was named: at least one block has to stay")
    outside = [i for i in layers if not 0 <= i < len(stack)]
    if outside:
        raise ValueError(
            f"layer {outside[0]} does not exist: the model has {len(stack)} blocks, "
            f"0 to {len(stack) - 1}"
        )

    # deepcopy's memo says what stands in for an object: the new configuration for the old one,
    # and the kept blocks for the whole stack.
    memo: dict[int, object] = {}
    if hasattr(model, "config"):
        memo[id(model.config)] = _shallower(model.config, layers)
    kept = nn.ModuleList()
    for position, layer in enumerate(layers):
        block = copy.deepcopy(stack[layer], dict(memo))
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
        kept.append(block)
    memo[id(stack)] = kept
    result = copy.deepcopy(model, memo)
    if hasattr(model, "config"):
        _require_loadable(result)
    return result


def _require_loadable(model: nn.Module) -> None:
    """Raise ValueError unless the model's configuration describes it: lists of layer numbers
    (mlp_only_layers) and rules of them (every second block sparse) do not survive the cut."""
    with torch.device("meta"):
        described = type(model)(copy.deepcopy(model.config)).state_dict()
    own = model.state_dict()
    differing = sorted(
        {name for name in own if name not in described or own[name].shape != described[name].shape}
        | (described.keys() - own.keys())
    )
    if differing:
        raise ValueError(
            f"{type(model.config).__name__} does not describe these layers ({differing[0]} "
            "differs): the model could not be loaded again; take layers that keep its pattern"
        )


def _shallower(config: object, layers: list[int]) -> object:
    """A copy of a `transformers` configuration for the kept layers."""
    values = config.to_dict()
    depth_name = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    if depth_name not in values:
        raise ValueError(
            f"{type(config).__name__} does not say how many blocks there are: take layers of the "
            "submodel that has them"
        )
    depth = values[depth_name]
    for name, value in values.items():
        # One entry a layer: attention kinds (layer_types), rotary switches (no_rope_layers), ...
        if isinstance(value, list) and len(value) == depth and not name.endswith("_token_id"):
            values[name] = [value[layer] for layer in layers]
    values[depth_name] = len(layers)
    result = type(config).from_dict(values)
    # The attention implementation is chosen at load and is not part of the dict.
    result._attn_implementation = config._attn_implementation
    return result
