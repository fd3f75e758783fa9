"""Folders of models that `transformers` has no class for: a known one some of whose layers others
have taken the place of. Their configuration has a model type of its own, so that no other loader
takes them for what they are not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def is_marked(folder: str | Path, suffix: str) -> bool:
    """Whether a folder's model type ends with `suffix`."""
    path = Path(folder, "config.json")
    return path.is_file() and json.loads(path.read_text()).get("model_type", "").endswith(suffix)


def mark(folder: str | Path, suffix: str, key: str, **values: Any) -> None:
    """Append `suffix` to the model type of a folder of `save_pretrained`; what it was is kept, with
    `values`, under `key` of the configuration."""
    path = Path(folder, "config.json")
    config = json.loads(path.read_text())
    config[key] = {**config.get(key, {}), "model_type": config["model_type"], **values}
    config["model_type"] += suffix
    partial = path.with_name("config.json.partial")
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(partial, path)


def load(
    folder: str | Path,
    key: str,
    remake: Callable[[nn.Module, Mapping[str, Any], Mapping[str, Tensor]], Any],
    dtype: str | torch.dtype = "auto",
) -> nn.Module:
    """The model of a marked folder, in evaluation mode.

    remake(model, values, state) changes a model of the original type in place, so that it has room
    for the weights in `state`; values: those under `key`. Raises ValueError for weights that are
    missing or too many.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    values: dict[str, Any] = json.loads(Path(folder, "config.json").read_text())
    made = values[key]
    saved = values.get("dtype", values.get("torch_dtype", "float32"))
    values["model_type"] = made["model_type"]
    config = AutoConfig.for_model(**{name: each for name, each in values.items() if name != key})
    dtype = getattr(torch, saved) if dtype == "auto" else dtype
    with torch.random.fork_rng(devices=[]):  # weights that are about to be replaced
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        state |= load_file(file)
    remake(model, made, state)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", ()) or ())
    wrong = [*unexpected, *(name for name in missing if name not in tied)]
    if wrong:
        raise ValueError(f"{folder} does not hold the weights of its configuration: {wrong[0]}")
    if Path(folder, "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model.eval()
