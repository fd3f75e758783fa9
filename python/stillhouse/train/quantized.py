"""Models with dual-binary layers as folders, which `transformers` has no configuration for."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.nn.fdb import FDBLinear
from stillhouse.nn.fdb_surgery import freeze_fdb_, has_fdb, quantize_fdb_
from stillhouse.nn.surgery import replace_modules_, train_only
from stillhouse.train import remade

KEY, SUFFIX = "fdb", "-fdb"  # in config.json, and of its model type
ALPHA = ".alpha"


def make_fdb(model: nn.Module, group_size: int) -> nn.Module:
    """`quantize_fdb_`, after which the scales alone learn. Raises ValueError as that does, and for
    a model that has dual-binary layers."""
    if has_fdb(model):
        raise ValueError("the model has dual-binary layers already")
    quantize_fdb_(model, group_size)
    train_only(model, "*.change")
    return model


def is_marked(folder: str | Path) -> bool:
    """Whether a folder is one of `save_fdb`."""
    return remade.is_marked(folder, SUFFIX)


def mark(folder: str | Path) -> None:
    """Make a folder of `save_pretrained` one of frozen dual-binary layers."""
    remade.mark(folder, SUFFIX, KEY)


def save_fdb(model: nn.Module, folder: str | Path) -> None:
    """Freeze the dual-binary layers of a `transformers` model, in place, and save it as a folder
    for `load_fdb`, in the stead of one that is there.

    Raises ValueError for a model without such layers, and where the folder holds something else
    than a model.

    Defaults: none.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from stillhouse.methods.compression import quantize_fdb_, save_fdb
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_attention_heads=2, **sizes))
        >>> report = quantize_fdb_(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_fdb(model, folder + "/model")
        >>> model.model.layers[0].mlp.up_proj.frozen
        True
    """
    folder = Path(folder)
    if not has_fdb(model):
        raise ValueError(f"{type(model).__name__} has no dual-binary layer: quantize_fdb_ it first")
    if folder.exists() and not (folder / "config.json").is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else than a model: name another folder")
    freeze_fdb_(model)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    mark(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_fdb(folder: str | Path, dtype: str | torch.dtype = "auto") -> nn.Module:
    """The model of a folder of `save_fdb`, in evaluation mode, with `generate` and all else that it
    had. dtype: of what is not dual-binary, "auto" as it was saved. The dense model exists for a
    moment. Raises ValueError for a folder of another kind, and for weights that are missing or too
    many.

    Defaults: none.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from stillhouse.methods.compression import load_fdb, quantize_fdb_, save_fdb
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_attention_heads=2, **sizes))
        >>> report = quantize_fdb_(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_fdb(model, folder + "/model")
        ...     again = load_fdb(folder + "/model")
        >>> again.model.layers[0].mlp.up_proj.frozen
        True
    """
    if not is_marked(folder):
        raise ValueError(f"{folder} is no folder of save_fdb (config.json with a type of {SUFFIX})")
    return remade.load(folder, KEY, _make_room, dtype)


def _make_room(model: nn.Module, made: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Frozen layers in the place of those that the state has scales of."""
    scales = {name.removesuffix(ALPHA): each for name, each in state.items() if ALPHA in name}

    def empty(path: str, module: nn.Module) -> FDBLinear:
        groups, bias = scales[path].shape[-1], module.bias
        return FDBLinear(
            module.in_features,
            module.out_features,
            bias is not None,
            module.in_features // groups,
            frozen=True,
            dtype=module.weight.dtype,
        )

    replace_modules_(model, lambda path, module: path in scales, empty)
