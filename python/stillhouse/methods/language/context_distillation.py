"""MEND's loss: a language model behind a few vectors against itself behind all demonstrations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.methods.language.side_by_side import row_lengths, side_by_side
from stillhouse.train import RowIndex, reduce, row_divergence
from stillhouse.train.forward import RowForward, frozen
from stillhouse.train.rows import IGNORED


def context_distillation_loss(
    lm: nn.Module,
    vectors: Tensor,
    demo_ids: Tensor,
    query_ids: Tensor,
    *,
    demo_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    answer_mask: Tensor | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    max_length: int | None = None,
) -> dict[str, Tensor]:
    """`loss` = kd_weight `kd` + ce_weight `ce`, two means over tokens, in nats.

    kd: KL(lm behind demo_ids || lm behind vectors) where a query token was read, the last one
    included. ce: -log q of the answer's tokens behind the vectors; there with an answer_mask.
    lm: a causal LM of `transformers`, read in evaluation mode; its parameters get no gradient (with
    activation checkpointing freeze it yourself), `vectors` do, float [B, l, H] in the space of its
    embeddings. demo_ids [B, D], query_ids [B, Q] (query and answer): int64, padded on the right
    where the bool masks are False. answer_mask: bool [B, Q]. temperature: both sides of kd, no T^2.
    max_length: the lm's window, for which demonstrations lose tokens on the left, the query none.
    Without kd_weight the demonstrations are not read and `kd` is left out. No logits exist but
    those of a chunk of rows where the lm's head is a plain linear layer, which both sides share.
    Raises ValueError for shapes and widths that do not match, an empty query, an answer at its
    first token, a query longer than max_length, temperature <= 0, ce_weight without an answer, and
    where both sides did not read the same query.

    Defaults: temperature 1 and, of stage A, kd_weight 1 and ce_weight 0; stage B has 1 and 1
    (paper and code).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import context_distillation_loss
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1)
        >>> lm = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, **sizes))
        >>> demonstrations, query = torch.tensor([[3, 1, 2, 5]]), torch.tensor([[3, 4]])
        >>> vectors = lm.get_input_embeddings()(demonstrations)
        >>> context_distillation_loss(lm, vectors, demonstrations, query)["kd"].abs() < 1e-5
        tensor(True)
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    n_demos = row_lengths("demo", demo_ids, demo_mask)
    n_query = row_lengths("query", query_ids, query_mask)
    embeddings = lm.get_input_embeddings()
    check_vectors(embeddings, vectors, len(query_ids))
    if len(demo_ids) != len(query_ids):
        raise ValueError(f"{len(demo_ids)} rows of demonstrations for {len(query_ids)} queries")
    if not bool((n_query > 0).all()):
        raise ValueError(f"query {int((n_query == 0).nonzero()[0])} is empty: nothing to compare")
    _check_answer(answer_mask, query_ids, ce_weight)
    skip = n_demos * 0
    if max_length is not None:
        if int(n_query.max()) > max_length:
            raise ValueError(f"a query has {int(n_query.max())} tokens, max_length is {max_length}")
        skip = (n_demos + n_query - max_length).clamp(min=0).minimum(n_demos)

    with frozen(lm):
        rows, parts = RowForward(lm), {}
        if kd_weight != 0:
            ids = side_by_side(demo_ids, query_ids, n_demos, n_query, skip)
            index = _query_rows(ids, n_demos - skip, n_query)
            with torch.no_grad():
                teacher = rows(lm, {"input_ids": ids}, index)
        n_vectors = torch.full_like(n_query, vectors.shape[1])
        embedded = embeddings(query_ids)
        inputs = side_by_side(vectors.to(embedded.dtype), embedded, n_vectors, n_query)
        none = query_ids.new_full(vectors.shape[:2], IGNORED)
        index = _query_rows(side_by_side(none, query_ids, n_vectors, n_query), n_vectors, n_query)
        student = rows(lm, {"inputs_embeds": inputs}, index)
        if kd_weight != 0:
            # Raises where both sides did not read the same query.
            kl = row_divergence(student, teacher, "forward_kl", temperature=temperature)
            parts["kd"] = reduce(kl)
        if answer_mask is not None:
            place = index.row - index.sequence * inputs.shape[1] - vectors.shape[1]
            answers = nn.functional.pad(answer_mask[:, 1:], (0, 1))[index.sequence, place]
            labels = index.target.masked_fill(~answers, IGNORED)
            nll = row_divergence(student, None, "cross_entropy", labels=labels)
            parts["ce"] = reduce(nll, labels != IGNORED)
    weights = {"kd": kd_weight, "ce": ce_weight}
    terms = [weights[name] * part for name, part in parts.items() if weights[name] != 0]
    return {"loss": sum(terms), **{name: part.detach() for name, part in parts.items()}}


def check_vectors(embeddings: nn.Module, vectors: Tensor, batch: int | None = None) -> None:
    """Raises ValueError unless vectors are [B, l, H], H the embeddings' width."""
    width = embeddings.weight.shape[1]
    if vectors.dim() != 3 or vectors.shape[-1] != width:
        raise ValueError(
            f"vectors must be [batch, vectors, {width}], as wide as the model's embeddings, got "
            f"{tuple(vectors.shape)}"
        )
    if batch is not None and len(vectors) != batch:
        raise ValueError(f"{len(vectors)} rows of vectors for {batch} queries")


def _check_answer(answer_mask: Tensor | None, query_ids: Tensor, ce_weight: float) -> None:
    if answer_mask is None:
        if ce_weight != 0:
            raise ValueError("ce_weight needs an answer_mask: which tokens of the query are answer")
        return
    if answer_mask.shape != query_ids.shape or answer_mask.dtype != torch.bool:
        raise ValueError(
            f"answer_mask must be bool {tuple(query_ids.shape)}, like the query, got "
            f"{answer_mask.dtype} {tuple(answer_mask.shape)}"
        )
    if bool(answer_mask[:, :1].any()):
        raise ValueError("an answer begins at the query's first token: no query token predicts it")


def _query_rows(ids: Tensor, start: Tensor, count: Tensor) -> RowIndex:
    """The rows that have read a query token; the last of them has nothing to predict (-100)."""
    place = torch.arange(ids.shape[1], device=ids.device)
    end = (start + count)[:, None]
    sequence, position = ((place >= start[:, None]) & (place < end)).nonzero(as_tuple=True)
    following = nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)[sequence, position]
    target = following.masked_fill(position + 1 == end[sequence, 0], IGNORED)
    return RowIndex(sequence * ids.shape[1] + position, target, sequence)
