"""Search for text that is likely given that it has an attribute, such as a length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOWEST = -20.0  # log q of what is not ruled out: early q are not to be trusted

Step = Callable[[Tensor], Any]
Attribute = Callable[[Tensor, Tensor, Any], Tensor]


class Hypothesis(NamedTuple):
    """A text: int64 [n] without its end, log p in nats (that of the end included where it is
    finished), and log p + log q, by which it was ranked."""

    ids: Tensor
    log_prob: float
    score: float
    finished: bool


def conditional_beam_search(
    step: Step,
    attribute: Attribute | None = None,
    *,
    beam: int,
    max_length: int,
    eos: int,
    expand: int | None = None,
) -> list[Hypothesis]:
    """The `beam` best texts by log p(x) + log q(attribute | x), the best first.

    step(ids int64 [B, t], on the CPU) gives the logits [B, V] of the next token, or a pair (logits,
    hidden) of them and anything that `attribute` is to see; t = 0 at first, so that a prompt is the
    step's own. attribute(ids [B, t], tokens [B, k], hidden) gives q [B, k] in [0, 1], the
    probability that a text has the attribute once this token is added; of the token `eos` it says
    whether the text has it: 0 or 1. q is a look-ahead: at each token it is replaced, not
    accumulated. 0 rules a text out; of any other q log q is at least -20. None: plain beam search.
    expand: how many tokens are tried of each text, the likeliest, next to the end; None: all.
    max_length: tokens at most, the end included; texts that came so far unfinished stand behind the
    finished ones. Fewer than `beam` are returned where q rules the rest out.
    Raises ValueError for beam, max_length or expand < 1, an eos outside the vocabulary, and q that
    is outside [0, 1] or undecided at the end of a text.

    Defaults: beams of 5 to 20 in the papers; -20 and all tokens ours.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import conditional_beam_search
        >>> def step(ids):  # token 2 ends: nothing at all is the likeliest text
        ...     return torch.tensor([[0.3, 0.2, 0.5]]).log().expand(len(ids), -1)
        >>> def not_empty(ids, tokens, hidden):
        ...     return (tokens != 2).double() if ids.shape[1] == 0 else torch.ones(tokens.shape)
        >>> options = dict(beam=2, max_length=3, eos=2)
        >>> [len(conditional_beam_search(step, q, **options)[0].ids) for q in (None, not_empty)]
        [0, 1]
    """
    if beam < 1 or max_length < 1 or (expand is not None and expand < 1):
        raise ValueError(
            f"expected beam, max_length and expand >= 1, got {beam}, {max_length}, {expand}"
        )
    ids, log_prob = torch.empty(1, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    score = log_prob
    finished: list[Hypothesis] = []
    for _ in range(max_length):
        log_p, hidden = _log_probs(step, ids, eos)
        tokens = _candidates(log_p, eos, expand)
        ends = tokens == eos
        total = log_prob[:, None] + log_p.gather(1, tokens)
        ranked = total + _look_ahead(attribute, ids, tokens, ends, hidden)
        order = ranked.flatten().argsort(descending=True, stable=True)
        order = order[ranked.flatten()[order] > -math.inf]
        at_end = ends.flatten()[order]
        for place in order[:beam][at_end[:beam]].tolist():
            row, value = place // tokens.shape[1], total.flatten()[place].item()
            finished.append(Hypothesis(ids[row], value, ranked.flatten()[place].item(), True))
        finished = sorted(finished, key=lambda each: -each.score)[:beam]
        running = order[~at_end][:beam]
        rows = running // tokens.shape[1]
        ids = torch.cat([ids[rows], tokens.flatten()[running][:, None]], 1)
        log_prob, score = total.flatten()[running], ranked.flatten()[running]
        # What is unfinished can end with at most the log p that it has.
        if not len(ids) or (len(finished) == beam and log_prob.max() <= finished[-1].score):
            break
    rest = zip(ids, log_prob.tolist(), score.tolist(), strict=True)
    return [*finished, *(Hypothesis(*each, False) for each in rest)][:beam]


def exact_length_mode(step: Step, n: int, *, eos: int) -> Hypothesis:
    """The likeliest text of exactly n tokens, found depth first.

    step and eos as in `conditional_beam_search`, one text at a time; the end is forbidden before n
    tokens and forced after them. A branch is left where its log p is not above that of the best
    text so far; even so, time may be exponential in n. Ties: the first in order of tokens.
    Raises ValueError for n < 0, and where every text of this length has probability 0.

    Defaults: none. Depth-first search with this bound: the thesis, after Stahlberg and Byrne.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import exact_length_mode
        >>> def step(ids):
        ...     return torch.tensor([[0.3, 0.2, 0.5]]).log()
        >>> best = exact_length_mode(step, 2, eos=2)
        >>> best.ids.tolist(), round(best.log_prob, 4)  # log(0.3 * 0.3 * 0.5)
        ([0, 0], -3.1011)
    """
    if n < 0:
        raise ValueError(f"expected a length >= 0, got {n}")
    best = Hypothesis(torch.empty(0, dtype=torch.int64), -math.inf, -math.inf, False)
    stack = [(torch.empty(1, 0, dtype=torch.int64), 0.0)]
    while stack:
        ids, log_prob = stack.pop()
        if log_prob <= best.log_prob:
            continue
        log_p = log_prob + _log_probs(step, ids, eos)[0][0]
        if ids.shape[1] == n:
            value = log_p[eos].item()
            if value > best.log_prob:
                best = Hypothesis(ids[0], value, value, True)
            continue
        order = log_p.argsort(descending=True, stable=True)
        order = order[(order != eos) & (log_p[order] > best.log_prob)]
        # The likeliest on top.
        for token in order.flip(0):
            stack.append((torch.cat([ids, token.view(1, 1)], 1), log_p[token].item()))
    if not best.finished:
        raise ValueError(f"every text of {n} tokens has probability 0")
    return best


def _log_probs(step: Step, ids: Tensor, eos: int) -> tuple[Tensor, Any]:
    """Float64 on the CPU, where the search is."""
    given = step(ids)
    logits, hidden = given if isinstance(given, tuple) else (given, None)
    if logits.dim() != 2 or len(logits) != len(ids) or not 0 <= eos < logits.shape[1]:
        raise ValueError(
            f"expected logits [{len(ids)}, V] with a column for the end {eos}, got "
            f"{tuple(logits.shape)}"
        )
    return logits.detach().double().cpu().log_softmax(-1), hidden


def _candidates(log_p: Tensor, eos: int, expand: int | None) -> Tensor:
    """Tokens to try [B, k]: the likeliest, and always the end."""
    columns = log_p.shape[1]
    if expand is None or expand >= columns:
        return torch.arange(columns).expand_as(log_p)
    others = log_p.index_fill(1, torch.tensor([eos]), -math.inf)
    best = others.topk(min(expand, columns - 1)).indices
    return torch.cat([best, torch.full((len(log_p), 1), eos)], 1)


def _look_ahead(
    attribute: Attribute | None, ids: Tensor, tokens: Tensor, ends: Tensor, hidden: Any
) -> Tensor:
    if attribute is None:
        return torch.zeros(tokens.shape, dtype=torch.float64)
    q = attribute(ids, tokens, hidden).detach().double().cpu()
    if q.shape != tokens.shape or not bool(((q >= 0) & (q <= 1)).all()):
        raise ValueError(
            f"attribute must give probabilities {tuple(tokens.shape)} in [0, 1], got "
            f"{tuple(q.shape)} in [{q.min().item():g}, {q.max().item():g}]"
        )
    if bool((ends & (q > 0) & (q < 1)).any()):
        raise ValueError("a text that ends here has the attribute or not: 0 or 1 at the end token")
    return q.log().clamp(min=LOWEST).masked_fill(q == 0, -math.inf)
