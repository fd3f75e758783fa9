"""Students with mixtures of experts as folders, which `transformers` has no configuration for: a
dense model some of whose feed-forward layers are `nn.moe.MoE`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.nn.moe import MoE, TopK, upcycle_

KEY = "mixtures"  # in config.json: how they were made, and the dense model's type
SUFFIX = "-with-mixtures"  # of the folder's model type, so that no other loader takes it for dense


def make_mixtures(model: nn.Module, experts: int) -> nn.Module:
    """`upcycle_` as LLaVA-MoD has it, in place: every other feed-forward layer becomes `experts`
    copies, of which a token gets two. The configuration says so, for `mark` and `load`. Raises
    ValueError as `upcycle_`, and for a model that has mixtures."""
    if has_mixtures(model):
        raise ValueError("the model has mixtures of experts already")
    upcycle_(model, TopK(2, noise="gumbel"), experts=experts)
    setattr(model.config, KEY, {"experts": experts, "model_type": model.config.model_type})
    return model


def has_mixtures(model: nn.Module) -> bool:
    """Whether a model has a `MoE`."""
    return any(isinstance(module, MoE) for module in model.modules())


def is_marked(folder: str | Path) -> bool:
    """Whether a folder is one that `mark` has marked."""
    path = Path(folder, "config.json")
    return path.is_file() and json.loads(path.read_text()).get("model_type", "").endswith(SUFFIX)


def mark(folder: str | Path) -> None:
    """Make a folder of `save_pretrained` one of mixtures, by its configuration's model type."""
    path = Path(folder, "config.json")
    values = json.loads(path.read_text())
    values["model_type"] = values[KEY]["model_type"] + SUFFIX
    partial = path.with_name("config.json.partial")
    partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    os.replace(partial, path)


def load(folder: str | Path, dtype: str | torch.dtype = "auto") -> nn.Module:
    """The model of a marked folder, in evaluation mode. Raises ValueError for weights that are
    missing or too many."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    values: dict[str, Any] = json.loads(Path(folder, "config.json").read_text())
    made = values[KEY]
    saved = values.get("dtype", values.get("torch_dtype", "float32"))
    values["model_type"] = made["model_type"]
    config = AutoConfig.for_model(**{name: each for name, each in values.items() if name != KEY})
    dtype = getattr(torch, saved) if dtype == "auto" else dtype
    with torch.random.fork_rng(devices=[]):  # weights that are about to be replaced
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    make_mixtures(model, made["experts"])
    state: dict[str, Any] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        state |= load_file(file)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", ()) or ())
    wrong = [*unexpected, *(name for name in missing if name not in tied)]
    if wrong:
        raise ValueError(f"{folder} does not hold the weights of its configuration: {wrong[0]}")
    return model.eval()
