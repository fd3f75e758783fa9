"""How far one language model is from another, on whole responses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.train import Responses, rollout, supervised_rows
from stillhouse.train.forward import evaluating, frozen, row_forward
from stillhouse.train.objective import row_divergence
from stillhouse.train.responses import Tokens, tokens

CHUNK = 64  # responses measured at a time


def sequence_kl(
    model: Any,
    reference: Any,
    prompts: Sequence[Tokens],
    *,
    responses: Responses | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> tuple[float, float, float]:
    """d(reference || model) of whole responses, in nats: (per_sequence, per_token, stderr).

    The responses are drawn from the reference (temperature 1), and at each of their tokens the KL
    is exact, not a difference of two log-probabilities. model, reference: as in `train.rollout`,
    of one vocabulary. responses: what was drawn from the reference before, instead of the prompts.
    per_sequence is the mean over responses of the sum over their tokens and stderr its standard
    error (NaN for one response), per_token the sum over all tokens divided by their number: compare
    that one where lengths differ.
    Raises ValueError for no prompts, no max_new_tokens, responses without a token, and models with
    unlike vocabularies.

    Defaults: temperature 1 (the paper).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import sequence_kl
        >>> def uniform(ids):
        ...     return torch.zeros(*ids.shape, 2)
        >>> def biased(ids):
        ...     return torch.tensor([3.0, 1.0]).log().expand(*ids.shape, 2)
        >>> each, token, _ = sequence_kl(biased, uniform, [[0]], max_new_tokens=3)
        >>> round(token, 4), round(each, 4)  # ln(2 / sqrt(3)) a token
        (0.1438, 0.4315)
    """
    if responses is None:
        if max_new_tokens is None:
            raise ValueError("sequence_kl draws responses: it needs max_new_tokens=")
        same_vocabulary(model, reference, prompts)
        responses = rollout(reference, prompts, max_new_tokens=max_new_tokens, seed=seed)
    sums = kl_sums(model, reference, responses)
    count = int(responses.mask.sum())
    if count == 0:
        raise ValueError("the responses have no token to measure")
    return sums.mean().item(), sums.sum().item() / count, stderr(sums)


@torch.no_grad()
def kl_sums(model: Any, reference: Any, responses: Responses) -> Tensor:
    """KL(reference || model) summed over each response, float64 [B]."""
    rows, other, sums = row_forward(model), row_forward(reference), []
    with evaluating(model), frozen(reference):
        for start in range(0, len(responses), CHUNK):
            batch = responses.part(slice(start, start + CHUNK)).batch()
            index = supervised_rows(batch["labels"])
            kl = row_divergence(rows(batch, index), other(batch, index), "forward_kl").double()
            sums.append(kl.new_zeros(len(batch["labels"])).index_add(0, index.sequence, kl))
    return torch.cat(sums)


def same_vocabulary(model: Any, reference: Any, prompts: Sequence[Tokens]) -> None:
    """Raise ValueError for unlike vocabularies: a token of one may be no row of the other."""
    first = tokens(prompts)[:1]
    if first:
        kl_sums(model, reference, Responses.of(first, [each[-1:] for each in first]))


def stderr(values: Tensor) -> float:
    return values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.nan
