"""How much the loss depends on each head, inner unit and hidden channel: gradients of masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.nn.slicing import ROLES, Keep, is_norm, role_of
from stillhouse.nn.surgery import blocks


@dataclass(frozen=True)
class Ranking(Keep):
    """All channels, the most important first, and `importance`: `hidden` [H], `heads` [blocks, n]
    and `ffn` [blocks, n], float64, in the model's own order."""

    importance: Mapping[str, Tensor] | None = None


def mask_importance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
) -> Ranking:
    """Channels in the order of E |dL/dxi|, xi a mask of ones on each, for `nn.surgery`.

    The masks multiply what enters the output projections of attention (a number a head) and of the
    feed-forward layers, and what every norm gives (hidden channels, one mask for the whole model).
    model: as `slice_channels` takes it; it runs in evaluation mode and learns nothing. batches:
    dicts for `model(**batch)`, whose `.loss` counts unless `loss(model, batch)` says another.
    Importances are divided by their norm in each block. Heads are ranked with those they share keys
    and values with. Returns a `Ranking`, a `Keep` whose `first(...)` says what stays.
    Raises ValueError without a batch, for a loss that is not finite, for a model of unknown parts.

    Defaults: the label loss (paper and code; they use sequences of 512).

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from stillhouse.methods.language import component_sparsity, mask_importance
        >>> from stillhouse.nn.surgery import slice_channels, take_layers
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=4, head_dim=4)
        >>> teacher = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, vocab_size=32, **sizes))
        >>> ids = torch.arange(12).view(2, 6)
        >>> ranking = mask_importance(teacher, [{"input_ids": ids, "labels": ids}])
        >>> stay = 1 - component_sparsity(0.75)
        >>> keep = ranking.first(hidden=int(16 * stay), heads=int(4 * stay), ffn=int(24 * stay))
        >>> student = take_layers(slice_channels(teacher, keep), [1, 2])
    """
    _, stack = blocks(model)
    config = model.config
    heads = config.num_attention_heads
    sizes = {
        "hidden": (config.hidden_size,),
        "heads": (len(stack), heads),
        "ffn": (len(stack), config.intermediate_size),
    }
    device = next(model.parameters()).device
    masks = {
        kind: torch.ones(size, device=device, requires_grad=True) for kind, size in sizes.items()
    }
    handles = _attach(model, stack, masks)
    was_training, total, count = model.training, dict.fromkeys(masks, 0.0), 0
    try:
        model.eval()
        for batch in batches:
            with torch.enable_grad():
                value = model(**batch).loss if loss is None else loss(model, batch)
            if not bool(value.isfinite()):
                raise ValueError(f"the loss of batch {count} is {value.item()}")
            gradients = torch.autograd.grad(value, list(masks.values()))
            for kind, gradient in zip(masks, gradients, strict=True):
                total[kind] = total[kind] + gradient.abs().double().cpu()
            count += 1
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if count == 0:
        raise ValueError("no batch was given: at least one is needed")
    importance = {
        kind: each / (each.norm(dim=-1, keepdim=True) + 1e-17) for kind, each in total.items()
    }
    order = {
        kind: each.argsort(dim=-1, descending=True, stable=True)
        for kind, each in importance.items()
    }
    shared = heads // (getattr(config, "num_key_value_heads", None) or heads)
    groups = importance["heads"].unflatten(-1, (-1, shared)).sum(-1)
    groups = groups.argsort(dim=-1, descending=True, stable=True)
    order["heads"] = (groups[..., None] * shared + torch.arange(shared)).flatten(-2)
    return Ranking(**order, importance=importance)


def _attach(model: nn.Module, stack: nn.ModuleList, masks: dict[str, Tensor]) -> list[Any]:
    """The masks as hooks."""
    handles = []

    def on_input(module: nn.Module, mask: Callable[[], Tensor]) -> None:
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args: (args[0] * mask().to(args[0].dtype), *args[1:])
            )
        )

    for number, block in enumerate(stack):
        found = set()
        for name, module in block.named_modules():
            role = role_of(name) if isinstance(module, nn.Linear) else None
            if role is None or role.rows != "hidden":
                continue
            kind, size = role.columns, module.in_features // masks[role.columns].shape[-1]
            on_input(
                module,
                lambda kind=kind, number=number, size=size: masks[kind][number].repeat_interleave(
                    size
                ),
            )
            found.add(kind)
        if found != {"heads", "ffn"}:
            for handle in handles:
                handle.remove()
            known = ", ".join(name for name, role in ROLES.items() if role.rows == "hidden")
            raise ValueError(f"block {number} has not the output projections looked for: {known}")
    for name, module in model.named_modules():
        if is_norm(name):
            handles.append(
                module.register_forward_hook(
                    lambda _, args, out: out * masks["hidden"].to(out.dtype)
                )
            )
    return handles
