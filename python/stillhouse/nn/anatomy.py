"""What a model is made of: its blocks, and the configuration that describes them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

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


def require_loadable(model: nn.Module, advice: str) -> nn.Module:
    """The model as its configuration describes it, on the meta device; ValueError, with `advice`,
    where that is another model: a saved one could not be loaded again."""
    with torch.device("meta"):
        described_model = type(model)(copy.deepcopy(model.config))
    described, own = described_model.state_dict(), model.state_dict()
    differing = sorted(
        {name for name in own if name not in described or own[name].shape != described[name].shape}
        | (described.keys() - own.keys())
    )
    if differing:
        raise ValueError(
            f"{type(model.config).__name__} does not describe these layers ({differing[0]} "
            f"differs): the model could not be loaded again; {advice}"
        )
    return described_model


def changed_configuration(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of a `transformers` configuration with other values, by their common names."""
    names = getattr(config, "attribute_map", {})
    values = config.to_dict() | {names.get(name, name): each for name, each in changes.items()}
    result = type(config).from_dict(values)
    # The attention implementation is chosen at load and is not part of the dict.
    result._attn_implementation = config._attn_implementation
    return result
