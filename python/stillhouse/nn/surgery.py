"""Cutting models: which blocks a model has, a smaller model made of some of them, another module
in a module's place, and which parameters learn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from stillhouse.nn.anatomy import blocks, changed_configuration, require_loadable
from stillhouse.nn.slicing import Keep, slice_channels, slice_linear

__all__ = [
    "Keep",
    "Replaced",
    "blocks",
    "replace_modules_",
    "slice_channels",
    "slice_linear",
    "take_layers",
    "train_only",
]


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
        # Lists of layer numbers (mlp_only_layers) and rules of them (every second block sparse) do
        # not survive the cut.
        require_loadable(result, "take layers that keep its pattern")
    return result


def replace_modules_(
    model: nn.Module,
    match: str | Iterable[str] | type[nn.Module] | Callable[[str, nn.Module], bool],
    make: Callable[[str, nn.Module], nn.Module],
) -> list[Replaced]:
    """Put `make(path, module)` in the place of every submodule that matches, in place.

    match: patterns of module paths (`"*.mlp"`; `*` crosses dots), a class, or a function of path
    and module. A module that stands at several paths is made anew once and stands at all of them;
    what is inside a replaced module is not looked at. The new module takes over the training mode,
    nothing else: device and dtype are `make`'s. Returns a row for each path, in the model's order.
    Raises ValueError where nothing matches and where the model itself does.

    Example:
        >>> from torch import nn
        >>> from stillhouse.nn.surgery import replace_modules_
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.GELU())
        >>> replace_modules_(model, nn.GELU, lambda path, module: nn.ReLU())
        [Replaced(path='1', before='GELU', after='ReLU', parameters_before=0, parameters_after=0)]
    """
    if isinstance(match, type):
        matches = lambda path, module: isinstance(module, match)  # noqa: E731
    elif callable(match):
        matches = match
    else:
        patterns = _patterns(match)
        matches = lambda path, module: any(fnmatchcase(path, each) for each in patterns)  # noqa: E731

    chosen: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        inside = any(path.startswith(other + ".") for other in chosen)
        if not inside and matches(path, module):
            chosen[path] = module
    if not chosen:
        raise ValueError(f"no module of {type(model).__name__} matches {_said(match)}")
    if "" in chosen:
        raise ValueError("the model itself matches: a module can only be replaced in another one")
    made: dict[int, nn.Module] = {}
    report = []
    for path, module in chosen.items():
        if id(module) not in made:
            made[id(module)] = make(path, module).train(module.training)
        new = made[id(module)]
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
        kinds = type(module).__name__, type(new).__name__
        report.append(Replaced(path, *kinds, _count(module), _count(new)))
    return report


class Replaced(NamedTuple):
    """One replacement: the module's path, the classes' names and their numbers of parameters."""

    path: str
    before: str
    after: str
    parameters_before: int
    parameters_after: int


def train_only(model: nn.Module, patterns: str | Iterable[str]) -> int:
    """Let exactly the parameters learn whose names match one of the patterns, in place.

    `*` crosses dots (`"*.experts.*"`, `"*"`). A tied parameter has several names, of which any may
    match. Returns the number of numbers that learn. Raises ValueError for a pattern that matches no
    parameter.

    Example:
        >>> from torch import nn
        >>> from stillhouse.nn.surgery import train_only
        >>> train_only(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), "1.*")
        4
    """
    patterns = _patterns(patterns)
    named = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise ValueError(f"no parameter of {type(model).__name__} matches {pattern!r}")
    learning = {
        id(parameter): parameter
        for name, parameter in named
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    for _, parameter in named:
        parameter.requires_grad_(id(parameter) in learning)
    return sum(parameter.numel() for parameter in learning.values())


def _patterns(given: str | Iterable[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _said(match: Any) -> str:
    return getattr(match, "__name__", None) or repr(match)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shallower(config: Any, layers: list[int]) -> Any:
    """A copy of a `transformers` configuration for the kept layers."""
    values = config.to_dict()
    depth_name = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    if depth_name not in values:
        raise ValueError(
            f"{type(config).__name__} does not say how many blocks there are: take layers of the "
            "submodel that has them"
        )
    depth = values[depth_name]
    changes = {
        # One entry a layer: attention kinds (layer_types), rotary switches (no_rope_layers), ...
        name: [value[layer] for layer in layers]
        for name, value in values.items()
        if isinstance(value, list) and len(value) == depth and not name.endswith("_token_id")
    }
    return changed_configuration(config, changes | {depth_name: len(layers)})
