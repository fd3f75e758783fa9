"""A causal language model that reads trees: one forward over nodes that see their ancestors."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from stillhouse.methods.speculative.kv_cache import TreeCache

ATTENTION = ("sdpa", "eager")  # that take a mask of their own for each query


class CachedModel:
    """A language model of `transformers` and what it has read of B sequences.

    `features` holds what its output head read in the last forward, [B, T, H], behind the final
    norm, where `needs_features` is set. Raises TypeError for what is no causal language model, and
    ValueError for one with an encoder, without an output head, or whose attention takes no masks.
    """

    def __init__(self, model: PreTrainedModel, *, needs_features: bool = False):
        check_model(model)
        self.model, self.needs_features = model, needs_features
        self.body = getattr(model, model.base_model_prefix)
        self.head = model.get_output_embeddings()
        self.vocab_size = self.head.weight.shape[0]
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.device = model.device
        # The cache's name changed between versions of transformers 5.
        names = inspect.signature(type(model).forward).parameters
        self._name = "cache" if "cache" in names else "past_key_values"
        self._least = torch.finfo(self.dtype).min
        self.cache: TreeCache | None = None
        self.features: Tensor | None = None

    def read(self, prompts: Sequence[Tensor], room: int) -> list[Tensor] | None:
        """Read all but the last token of each prompt, int64 [n] with n >= 1; their features, where
        they are needed. room: places to have behind the longest."""
        ids = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True).to(self.device)
        # One token at least, or nothing would say how large keys are; it is not counted then.
        ids = ids[:, : max(1, ids.shape[1] - 1)]
        read = DynamicCache(config=self.model.config)
        hidden = self.body(input_ids=ids, use_cache=True, **{self._name: read}).last_hidden_state
        lengths = [len(each) - 1 for each in prompts]
        self.cache = TreeCache(read, lengths, room)
        if not self.needs_features:
            return None
        return [row[:length] for row, length in zip(hidden, lengths, strict=True)]

    def forward(self, tokens: Tensor, positions: Tensor, visible: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] behind nodes with these tokens and positions, int64 [B, T].

        visible: bool [B, T, N + T], which of the N nodes that are there already and of these each
        of them sees, itself included; all of a sequence before them is seen anyhow. None: each
        sees all before it.
        """
        cache, count = self.cache, tokens.shape[1]
        cache.reserve(cache.end + count)
        # One query that sees everything needs no mask, which is the fastest attention.
        whole = visible is None and count == 1 and len(set(cache.lengths)) == 1
        mask = None if whole else self._mask(tokens.shape, visible)
        arguments = dict(input_ids=tokens, position_ids=positions, attention_mask=mask)
        arguments |= {"use_cache": True, self._name: cache}
        if not self.needs_features:
            logits = self.model(**arguments).logits
        else:
            with self.head.register_forward_pre_hook(self._keep):
                logits = self.model(**arguments).logits
        cache.stored += count
        return logits

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0]

    def _mask(self, shape: torch.Size, visible: Tensor | None) -> Tensor:
        """Additive, [B, 1, T, places]: bool is no mask to eager attention."""
        (rows, count), cache = shape, self.cache
        width, end = cache.width, cache.end
        mask = torch.zeros(rows, 1, count, end + count, dtype=self.dtype, device=self.device)
        if visible is None:
            visible = torch.ones(1, count, cache.stored + count, dtype=torch.bool)
            visible = visible.tril(cache.stored)
        mask[:, 0, :, width:].masked_fill_(~visible.to(self.device), self._least)
        for row, length in enumerate(cache.lengths):
            if length < width:
                mask[row, :, :, length:width] = self._least
        return mask


def check_model(model: Any, name: str = "target") -> None:
    """Raise TypeError or ValueError unless `CachedModel` can run it."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected {name} to be a causal language model of transformers, got {type(model)}"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"expected {name} to be a decoder, got the encoder-decoder {type(model)}")
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no output head: a causal language model is needed"
        )
    attention = model.config._attn_implementation
    if attention not in ATTENTION:
        raise ValueError(
            f"expected attention of {name} as {' or '.join(ATTENTION)}, which take a tree's mask, "
            f"got {attention}: load it with attn_implementation='sdpa'"
        )
