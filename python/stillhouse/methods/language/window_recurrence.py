"""Recurrence between windows: a decoder with short windows remembers the ones before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.utils.checkpoint import checkpoint

from stillhouse.methods.language.attention_slot import attention_of, beside
from stillhouse.nn.surgery import blocks
from stillhouse.train import LogitRows, capture, reduce
from stillhouse.train.forward import RowForward, evaluating
from stillhouse.train.objective import row_divergence
from stillhouse.train.rows import IGNORED, RowIndex, supervised_rows


class WindowRecurrence(nn.Module):
    """A language model that reads a text in windows, each with a summary of the one before it:
    r = W2 gelu(W1 mean(H)), H the window's hidden states of depth `layer_out`, the mean over its
    tokens. In the next window r stands beside the inputs of the attention of blocks `layer_in`: one
    more key and value, without a position, seen by all tokens, and no query. The first window has
    none.

    lm: a causal `transformers` model whose attentions get `hidden_states` and, if they turn by
    position, `position_embeddings` (Llama, Mistral, Qwen, GPT-NeoX, GPT-2). It works by hooks that
    are there during a window only; the model is used as it is, without a cache, and trained with
    W1 [hidden, D] and W2 [D, hidden]. layer_out: blocks passed, 0 = embeddings, before the final
    norm. layer_in: 0-based blocks; None: all; (): windows without recurrence, the baseline.
    W2 starts at 0. Such a slot, a key and value of 0 where the projections have no bias, still
    takes its share of each softmax: 1 / (n + 1) of a uniform one over n tokens.

    Raises ValueError for depths and blocks the model does not have, and for hidden < 1.

    Defaults: all blocks; hidden = D (ours). The thesis fine-tunes with windows of about 300.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language.window_recurrence import WindowRecurrence
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1)
        >>> lm = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=2, **sizes))
        >>> model = WindowRecurrence(lm, layer_out=1)
        >>> ids = torch.arange(12)[None]
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        >>> model.loss(batch, window=4).backward()
        >>> model.score(batch, window=4).shape
        torch.Size([1, 12])
    """

    def __init__(
        self,
        lm: nn.Module,
        layer_out: int,
        layer_in: int | Iterable[int] | None = None,
        hidden: int | None = None,
        *,
        seed: int = 0,
    ):
        super().__init__()
        path, layers = blocks(lm)
        own = range(len(layers)) if layer_in is None else layer_in
        own = [own] if isinstance(own, int) else list(own)
        if not 0 <= layer_out <= len(layers):
            raise ValueError(f"layer_out must lie in [0, {len(layers)}], got {layer_out}")
        if not all(0 <= each < len(layers) for each in own):
            raise ValueError(f"layer_in must name blocks of 0 to {len(layers) - 1}, got {own}")
        if hidden is not None and hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        width, like = lm.config.hidden_size, next(lm.parameters())
        draw = torch.randn(hidden or width, width, generator=torch.Generator().manual_seed(seed))
        self.lm = lm
        self.first = nn.Parameter((draw * width**-0.5).to(like))
        self.second = nn.Parameter(like.new_zeros(width, hidden or width))
        self.attentions = [attention_of(layers[each]) for each in own]
        # What goes into the first block, or comes out of the last one that was passed.
        self.tap = f"{path}.{max(layer_out - 1, 0)}", layer_out == 0

    def loss(self, batch: Mapping[str, Any], *, window: int, **options: Any) -> Tensor:
        """Mean negative log-likelihood of the batch's targets, over all windows: a scalar. The
        arguments and errors of `forward`."""
        nll = self(batch, window=window, **options)
        return reduce(nll[:, 1:], batch["labels"][:, 1:] != IGNORED)

    @torch.no_grad()
    def score(self, batch: Mapping[str, Any], *, window: int, overlap: int = 0) -> Tensor:
        """`forward` in evaluation mode and without a gradient."""
        with evaluating(self):
            return self(batch, window=window, overlap=overlap)

    def forward(
        self,
        batch: Mapping[str, Any],
        *,
        window: int,
        overlap: int = 0,
        bptt: int = 2,
        checkpointing: bool = True,
    ) -> Tensor:
        """-log q of each target at its own place, 0 elsewhere: [B, T], float32, in nats.

        batch: `input_ids`, `attention_mask`, `labels` int64 [B, T], padded on the right. A window
        is `window` tokens that are read; its last one says the first of the next. overlap: tokens
        that a window reads again from the one before, at window / (window - overlap) of the cost.
        bptt: so many windows at a time are one graph; before the first of them the states that W1
        gets are cut off. checkpointing: a window's activations are made again in the backward pass.
        Raises ValueError for a window of more tokens than the model has positions, window or
        bptt < 1, overlap outside [0, window), padding on the left, and a batch of one token.
        """
        _check(self.lm, batch, window, overlap, bptt)
        ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
        rows, result, mean = RowForward(self.lm), [], None
        for number, start in enumerate(
            range(0, max(ids.shape[1] - 1 - overlap, 1), window - overlap)
        ):
            own = labels[:, start : start + window + 1].clone()
            if number:
                own[:, : overlap + 1] = IGNORED
            seen = slice(start, start + own.shape[1] - 1)
            index = supervised_rows(own)
            # The labels are one token wider than what is read.
            index = index._replace(row=index.row - index.sequence)
            if number and number % bptt == 0:
                mean = mean.detach()
            inputs = rows, ids[:, seen], mask[:, seen], index, mean
            if checkpointing and torch.is_grad_enabled():
                nll, mean = checkpoint(self._window, *inputs, use_reentrant=False)
            else:
                nll, mean = self._window(*inputs)
            at = index.sequence * ids.shape[1] + start + index.row % (own.shape[1] - 1) + 1
            result.append((at, nll))
        at, nll = (torch.cat(each) for each in zip(*result, strict=True))
        return nll.new_zeros(labels.numel()).index_copy(0, at, nll).view(labels.shape)

    def _window(
        self, rows: RowForward, ids: Tensor, mask: Tensor, index: RowIndex, mean: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The rows' losses [N], and the mean of the states [B, D] that the next window gets."""

        def compute(found: LogitRows) -> Tensor:
            return row_divergence(found, None, "cross_entropy", labels=index.target)

        extra = None if mean is None else gelu(mean @ self.first.T) @ self.second.T
        path, inputs = self.tap
        with (
            beside(self.attentions, extra),
            capture(self.lm, path, inputs=inputs, detach=False) as taps,
        ):
            nll = rows(self.lm, {"input_ids": ids}, index, compute)
        real = mask[..., None].to(taps[path])
        return nll, (taps[path] * real).sum(1) / real.sum(1).clamp(min=1)


def _check(lm: nn.Module, batch: Mapping[str, Any], window: int, overlap: int, bptt: int) -> None:
    positions = getattr(lm.config, "max_position_embeddings", None)
    if window < 1 or bptt < 1:
        raise ValueError(f"window and bptt must be at least 1, got {window} and {bptt}")
    if positions is not None and window > positions:
        raise ValueError(f"a window of {window} tokens: the model has {positions} positions")
    if not 0 <= overlap < window:
        raise ValueError(f"overlap must lie in [0, {window}), got {overlap}")
    if batch["labels"].shape[1] < 2:
        raise ValueError("a batch of one token has nothing to predict")
    if bool((batch["attention_mask"].diff(dim=1) > 0).any()):
        raise ValueError("the batch is padded on the left: pad it on the right")
