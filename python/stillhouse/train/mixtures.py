"""Students with mixtures of experts as folders, which `transformers` has no configuration for: a
dense model some of whose feed-forward layers are `nn.moe.MoE`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from stillhouse.nn.moe import MoE, TopK, upcycle_
from stillhouse.train import remade

KEY = "mixtures"  # in config.json: how they were made, and the dense model's type
SUFFIX = "-with-mixtures"


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
    return remade.is_marked(folder, SUFFIX)


def mark(folder: str | Path) -> None:
    """Make a folder of `save_pretrained` one of mixtures, by its configuration's model type."""
    remade.mark(folder, SUFFIX, KEY)


def load(folder: str | Path, dtype: str | torch.dtype = "auto") -> nn.Module:
    """The model of a marked folder, in evaluation mode. Raises ValueError for weights that are
    missing or too many."""
    return remade.load(
        folder, KEY, lambda model, made, state: make_mixtures(model, made["experts"]), dtype
    )
