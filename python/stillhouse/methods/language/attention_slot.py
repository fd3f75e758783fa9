"""One more key and value beside those of a text, in attentions of `transformers` models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


@contextmanager
def beside(attentions: list[nn.Module], extra: Tensor | None) -> Iterator[None]:
    """Within, `extra` [B, D] is an input of each of these attentions that nothing comes out of.

    It stands first, unturned: causal attention lets all tokens see it, and its own output is taken
    away again.
    """

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        states = args[0] if args else kwargs["hidden_states"]
        states = torch.cat([extra[:, None].to(states), states], 1)
        if args:
            args = (states, *args[1:])
        else:
            kwargs["hidden_states"] = states
        if kwargs.get("position_embeddings") is not None:
            cos, sin = kwargs["position_embeddings"]
            turned = pad(cos, (0, 0, 1, 0), value=1.0), pad(sin, (0, 0, 1, 0))
            kwargs["position_embeddings"] = turned
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = _wider(kwargs["attention_mask"])
        return args, kwargs

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return output[:, 1:] if isinstance(output, Tensor) else (output[0][:, 1:], *output[1:])

    handles = []
    try:
        for each in attentions if extra is not None else ():
            handles.append(each.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(each.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _wider(mask: Any) -> Tensor:
    """A mask [B, 1, T, T] with a first column that all rows see, and a row that sees no other."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise ValueError(
            "expected a mask [B, 1, T, T]: load the model with attn_implementation='sdpa'"
        )
    yes, no = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    first = torch.full_like(mask[..., :1, :], no)
    return pad(torch.cat([first, mask], -2), (1, 0), value=yes)


def attention_of(block: nn.Module) -> nn.Module:
    """The one attention of a block; ValueError where there is none, or several."""
    found = [each for each in block.children() if type(each).__name__.endswith("Attention")]
    if len(found) != 1:
        raise ValueError(f"{type(block).__name__} has {len(found)} attentions: expected one")
    return found[0]
