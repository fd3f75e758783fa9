"""Log-probabilities of whole sequences, without logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.train.forward import RowForward
from stillhouse.train.objective import LogitRows, row_divergence
from stillhouse.train.rows import RowIndex, supervised_rows


def sequence_logprobs(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    reduction: Literal["sum", "mean", "none", "per_byte"] = "sum",
) -> Tensor:
    """log q(targets | what is before them) of each sequence under a causal language model, in nats.

    batch: `input_ids`, `attention_mask`, `labels` int64 [B, T] (-100 = not a target; the first
    token never is), optionally `vocab_size`, the columns that count; for "per_byte" `bytes`, int64
    [B], the length of the targets' text. reduction: "sum" over a sequence's targets, "mean",
    "per_byte", all [B]; "none": [B, T], each target's at its own place and 0 elsewhere.
    Returns float32 (float64 of a float64 model), differentiable, in the model's own mode. One fused
    cross-entropy over the targets' rows, inside the model's forward: [N, V] logits do not exist
    where the head is a plain linear layer. A sequence without a target has 0.
    Raises ValueError for an unknown reduction, a batch without labels or bytes, a number of bytes
    that is not positive, and a model without an output head.

    Example:
        >>> import torch
        >>> from stillhouse.train import sequence_logprobs
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, **sizes))
        >>> ids = torch.tensor([[3, 1, 2]])
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        >>> sequence_logprobs(model, batch).shape
        torch.Size([1])
    """
    if reduction not in ("sum", "mean", "none", "per_byte"):
        raise ValueError(f"reduction must be sum, mean, none or per_byte, got {reduction!r}")
    if "labels" not in batch:
        raise ValueError(f"a batch needs labels, this one has {', '.join(batch)}")
    size = batch.get("bytes")
    if reduction == "per_byte" and (size is None or not bool((size > 0).all())):
        raise ValueError("per_byte needs batch['bytes'], the positive length of each target text")
    labels = batch["labels"]
    index = supervised_rows(labels)
    inputs = {name: value for name, value in batch.items() if name != "bytes"}
    # Inside the forward, where a sharded head is whole.
    per_row = RowForward(model)(model, inputs, index, lambda rows: row_logprobs(rows, batch))
    if reduction == "none":
        # A row says the token after it.
        result = per_row.new_zeros(labels.numel()).index_copy(0, index.row + 1, per_row)
        return result.view(labels.shape)
    total = by_sequence(per_row, index, len(labels))
    if reduction == "mean":
        return total / torch.bincount(index.sequence, minlength=len(labels)).clamp(min=1)
    return total / size if reduction == "per_byte" else total


def row_logprobs(rows: LogitRows, batch: Mapping[str, Any]) -> Tensor:
    """log q(target) of each supervised row, [N]; `batch["vocab_size"]` leaves columns out."""
    options = dict(labels=rows.index.target, vocab_size=batch.get("vocab_size"))
    return -row_divergence(rows, None, "cross_entropy", **options)


def by_sequence(per_row: Tensor, index: RowIndex, count: int) -> Tensor:
    """Sums of [N] rows over each of `count` sequences, [count]."""
    return per_row.new_zeros(count).index_add(0, index.sequence, per_row)
