"""Logits of the supervised rows only, from any causal language model's own forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.train.objective import LogitRows
from stillhouse.train.rows import RowIndex

# What a batch holds for us and not for the model.
OURS = ("labels", "record", "denominator", "vocab_size")


class RowForward:
    """Makes a causal LM compute its output head for chosen rows instead of for every token.

    A hook in front of the output head replaces hidden [B, T, H] by the rows [N, H], so the model's
    own head, soft-cap and scale give logits [N, V]. It sits inside the model's forward, where
    data-parallel wrappers, sharded weights, adapters and autocast have already done their part.
    Without a selection the model is untouched: generation and other callers see the usual logits.

    Raises ValueError for a model without an output head.
    """

    def __init__(self, model: nn.Module):
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise ValueError(
                f"{type(model).__name__} has no output head: a causal language model is needed"
            )
        self.head = head
        self.rows: Tensor | None = None
        self.hidden: Tensor | None = None
        self._hook = head.register_forward_pre_hook(self._select)

    def close(self) -> None:
        """Take the hook off again."""
        self._hook.remove()

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.rows is None:
            return None
        hidden = args[0]
        self.hidden = hidden.reshape(-1, hidden.shape[-1])[self.rows]
        return (self.hidden, *args[1:])

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Any], index: RowIndex, **options: Any
    ) -> LogitRows:
        """The rows `index` of `model`'s forward; `model` may wrap the one given at first.

        `batch` is the language-model batch, `options` go to the forward.
        """
        inputs = {name: value for name, value in batch.items() if name not in OURS}
        self.rows, self.hidden = index.row, None
        try:
            # The forward is asked for no cache: it would hold every layer's keys for nothing.
            output = model(**inputs, use_cache=False, **options)
        finally:
            self.rows = None
        if self.hidden is None:
            raise ValueError(
                f"{type(model).__name__} did not call its output head: "
                "models that compute logits without it are not supported"
            )
        hidden, self.hidden = self.hidden, None
        return LogitRows(
            logits=output.logits,
            index=index,
            hidden=hidden,
            head=self.head,
            hidden_states=output.hidden_states if options.get("output_hidden_states") else None,
        )


class FrozenTeacher:
    """A language model that is only read: evaluation mode, no gradients, supervised rows only."""

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)
        self._forward = RowForward(model)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any], index: RowIndex, **options: Any) -> LogitRows:
        """The teacher's rows `index` for this batch."""
        return self._forward(self.model, batch, index, **options)
