"""What follows a prefix that is read once: its cache, and candidates' scores behind it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.methods.language.context_distillation import check_vectors
from stillhouse.methods.language.side_by_side import row_lengths, side_by_side
from stillhouse.train import sequence_logprobs
from stillhouse.train.forward import evaluating
from stillhouse.train.rows import IGNORED


@torch.no_grad()
def prefix_cache(lm: nn.Module, vectors: Tensor) -> Any:
    """The keys and values of `vectors` in every layer: a cache of `transformers` for queries that
    come behind them.

    lm: a causal LM of `transformers`; vectors: float [B, l, H] in the space of its embeddings.
    Raises ValueError for another width and for no vector.

    Defaults: none; the paper computes them once for a set of demonstrations.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import prefix_cache
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1)
        >>> lm = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, **sizes))
        >>> prefix_cache(lm, torch.randn(1, 5, 8)).get_seq_length()
        5
    """
    check_vectors(lm.get_input_embeddings(), vectors)
    if vectors.shape[1] < 1:
        raise ValueError("there is no vector to keep: l must be at least 1")
    with evaluating(lm):
        # Without the head: nothing is predicted here.
        return lm.base_model(inputs_embeds=vectors, use_cache=True).past_key_values


@torch.no_grad()
def score_candidates(
    lm: nn.Module,
    prefix: Any,
    query_ids: Tensor,
    candidates: Sequence[Sequence[int]],
    *,
    query_mask: Tensor | None = None,
) -> Tensor:
    """Mean log-probability of each candidate's tokens after [prefix; query]: float32 [B, n], nats.

    prefix: vectors [B or 1, l, H], the `prefix_cache` of such, which is left as it is, or None.
    query_ids: int64 [B, Q] without an answer, padded on the right where query_mask (bool) is False.
    candidates: n sequences of token ids, the same for all queries. The largest is the prediction.
    Raises ValueError without a candidate or a token in one, for an empty query, and where prefix
    and query have other batches or widths.

    Defaults: none; the mean over a candidate's tokens is the paper's.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import score_candidates
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1)
        >>> lm = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, **sizes))
        >>> vectors, query = torch.randn(1, 5, 8), torch.tensor([[3, 1], [2, 4]])
        >>> score_candidates(lm, vectors, query, [[7], [8, 9], [6]]).shape
        torch.Size([2, 3])
    """
    candidates = [torch.as_tensor(each, dtype=torch.int64).flatten() for each in candidates]
    if not candidates or any(each.numel() == 0 for each in candidates):
        raise ValueError("expected at least one candidate, and a token in each")
    n_query = row_lengths("query", query_ids, query_mask)
    if not bool((n_query > 0).all()):
        raise ValueError("a query is empty: nothing predicts the candidates' first token")
    batch, n, device = len(query_ids), len(candidates), query_ids.device
    if isinstance(prefix, Tensor):
        prefix = prefix_cache(lm, prefix)
    ends = nn.utils.rnn.pad_sequence(candidates, batch_first=True).to(device).repeat(batch, 1)
    lengths = torch.tensor([len(each) for each in candidates], device=device).repeat(batch)
    queries, n_query = query_ids.repeat_interleave(n, 0), n_query.repeat_interleave(n)
    ids = side_by_side(queries, ends, n_query, lengths)
    place = torch.arange(ids.shape[1], device=device)
    answer = (place >= n_query[:, None]) & (place < (n_query + lengths)[:, None])
    inputs = {"input_ids": ids, "labels": ids.masked_fill(~answer, IGNORED)}
    if prefix is not None:
        inputs["past_key_values"] = _repeated(prefix, batch, n)
    with evaluating(lm):
        return sequence_logprobs(lm, inputs, reduction="mean").view(batch, n)


def _repeated(prefix: Any, batch: int, n: int) -> Any:
    """A copy of the cache for n rows of each query: a forward writes into what it is given."""
    rows = prefix.layers[0].keys.shape[0]
    if rows not in (1, batch):
        raise ValueError(f"the prefix has {rows} rows for {batch} queries: expected as many, or 1")
    copied = copy.deepcopy(prefix)
    copied.batch_repeat_interleave(n if rows == batch else n * batch)
    return copied
