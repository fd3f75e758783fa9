"""Token sequences rewritten so that a causal model learns to fill in: CodeGen2's format.

Of a document d with the spans s_1 .. s_M cut out (arXiv 2305.02309 and its model card):

    d with <mask_m> for each s_m, <|endoftext|> <sep>, then <mask_m> s_m <eom> for each m

A transform maps ids [n] to an `Example`: `transform(ids, document_ids=None, *, generator)`. Each
document of a packed sequence is rewritten on its own, its spans numbered from 1.

The code of the corruption was never released. The format is the model card's; how many spans and
how long, and that the loss is on what follows <sep>, is our reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from stillhouse.train.examples import Example

Spans = list[tuple[int, int]]
Transform = Callable[..., Example]


@dataclass(frozen=True)
class Sentinels:
    """Ids of <mask_1> .. <mask_M>, <sep>, <eom> and <|endoftext|>.

    Raises ValueError for no mask, ids that are negative or the same.

    Defaults: none; the released models have them in their vocabulary.

    Example:
        >>> from stillhouse.methods.language import Sentinels
        >>> Sentinels(masks=(100, 101), separator=102, end_of_span=103, end_of_text=99).masks
        (100, 101)
    """

    masks: tuple[int, ...]
    separator: int
    end_of_span: int
    end_of_text: int

    def __post_init__(self) -> None:
        every = (*self.masks, self.separator, self.end_of_span, self.end_of_text)
        if not self.masks or min(every) < 0 or len(set(every)) < len(every):
            raise ValueError(f"sentinels need a mask, and ids that differ, got {every}")

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, count: int) -> Sentinels:
        """The ids of <mask_1> .. <mask_count> and the rest in a tokenizer's vocabulary. Raises
        ValueError, naming the first, for a token that it has not got."""
        names = [*(f"<mask_{m + 1}>" for m in range(count)), "<sep>", "<eom>", "<|endoftext|>"]
        known = tokenizer.get_vocab()
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(
                f"the tokenizer has no token {missing[0]}: add it (add_special_tokens) and resize "
                "the model's embeddings"
            )
        return cls(tuple(known[name] for name in names[:count]), *(known[n] for n in names[count:]))


class CausalLM:
    """Ids as they are, each predicted from those before it.

    Raises ValueError for less than two tokens.

    Defaults: none.

    Example:
        >>> from stillhouse.methods.language import CausalLM
        >>> CausalLM()([5, 6, 7]).loss_mask.tolist()
        [True, True, True]
    """

    def __call__(
        self, ids: Any, document_ids: Any = None, *, generator: torch.Generator | None = None
    ) -> Example:
        ids, _ = _documents(ids, document_ids)
        documents = None if document_ids is None else np.asarray(document_ids, dtype=np.int32)
        return Example(ids, np.ones(len(ids), dtype=bool), document_ids=documents)


class PrefixLM:
    """Ids with the first k, k uniform in 1 .. n - 1, given: targets begin after them.

    The attention mask is `prefix_lm_mask` of the batch's `prefix_length`.
    Raises ValueError for less than two tokens, and for more documents than one.

    Defaults: none; the paper finds that a prefix brings nothing, and keeps causal attention.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import PrefixLM
        >>> example = PrefixLM()([5, 6], generator=torch.Generator().manual_seed(0))
        >>> example.prefix_length, example.loss_mask.tolist()
        (1, [False, True])
    """

    def __call__(
        self, ids: Any, document_ids: Any = None, *, generator: torch.Generator
    ) -> Example:
        ids, pieces = _documents(ids, document_ids)
        if len(pieces) > 1:
            raise ValueError(f"a prefix is of one document, got {len(pieces)}")
        given = int(torch.randint(1, len(ids), (), generator=generator))
        documents = None if document_ids is None else np.asarray(document_ids, dtype=np.int32)
        mask = np.arange(len(ids)) >= given
        return Example(ids, mask, prefix_length=given, document_ids=documents)


class SpanCorruption:
    """Spans cut out of each document, and asked for after it.

    Of a document of n tokens round(r n) are hidden, r uniform in `ratio`, in M spans, none next to
    another: M is round(r n / mean), the mean length being log-uniform in `mean_span` and at most
    r n, and not above `max_spans`. Lengths and gaps are random compositions (T5's scheme). The
    result has n + 3 M + 2 tokens; documents shorter than `minimum` stay as they are.
    loss_on: "targets", all that follows <sep> but the masks that open a span; "all", what stands
    before it too. `prefix_length` of a single document is where the targets begin. Documents come
    without <|endoftext|>: the format puts it there.
    Raises ValueError for a ratio outside (0, 1), spans shorter than 1, more spans than sentinels,
    and in the call for less than two tokens, `document_ids` of another length, ids that are
    sentinels, and a result above `max_length`.

    Defaults: all ours, the paper gives none but that documents are corrupted one by one.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import Sentinels, SpanCorruption
        >>> words = Sentinels(masks=(100, 101), separator=102, end_of_span=103, end_of_text=99)
        >>> transform = SpanCorruption(words, ratio=(0.5, 0.5), mean_span=(3, 3), minimum=2)
        >>> transform([1, 2, 3, 4, 5, 6], generator=torch.Generator().manual_seed(0)).input_ids
        array([  1,   2,   3, 100,  99, 102, 100,   4,   5,   6, 103], dtype=int32)
    """

    def __init__(
        self,
        sentinels: Sentinels,
        ratio: tuple[float, float] = (0.05, 0.5),
        mean_span: tuple[float, float] = (3, 64),
        *,
        max_spans: int | None = None,
        minimum: int = 16,
        loss_on: str = "targets",
        max_length: int | None = None,
    ):
        if not 0 < ratio[0] <= ratio[1] < 1:
            raise ValueError(f"expected 0 < low <= high < 1 as ratio, got {ratio}")
        if not 1 <= mean_span[0] <= mean_span[1]:
            raise ValueError(f"expected 1 <= low <= high as mean_span, got {mean_span}")
        known = len(sentinels.masks)
        self.max_spans = known if max_spans is None else max_spans
        if not 1 <= self.max_spans <= known:
            raise ValueError(f"max_spans must lie in [1, {known}], the masks, got {max_spans}")
        if minimum < 2:
            raise ValueError(f"minimum must be at least 2 tokens, got {minimum}")
        _check_loss_on(loss_on)
        self.sentinels, self.ratio, self.mean_span = sentinels, ratio, mean_span
        self.minimum, self.loss_on, self.max_length = minimum, loss_on, max_length

    def __call__(
        self, ids: Any, document_ids: Any = None, *, generator: torch.Generator
    ) -> Example:
        def spans(n: int) -> Spans:
            return self._spans(n, generator) if n >= self.minimum else []

        return _rewritten(ids, document_ids, self.sentinels, spans, self.loss_on, self.max_length)

    def _spans(self, n: int, generator: torch.Generator) -> Spans:
        ratio, at = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        low, high = self.ratio
        hidden = round((low + (high - low) * ratio) * n)
        if hidden == 0:
            return []
        shortest, longest = self.mean_span
        mean = min(shortest * (longest / shortest) ** at, hidden)
        kept = n - hidden
        count = min(max(1, round(hidden / mean)), self.max_spans, hidden, kept + 1)
        cuts = [0, *(1 + c for c in _choose(hidden - 1, count - 1, generator)), hidden]
        # Distinct places among the kept tokens: between two spans at least one of them stays.
        places = _choose(kept + 1, count, generator)
        return [(p + a, p + b) for p, a, b in zip(places, cuts, cuts[1:], strict=False)]


class FillInMiddle:
    """One span a document, between two uniform cuts: prefix, middle and suffix.

    The same format with M = 1. loss_on and max_length as in `SpanCorruption`.
    Raises ValueError as `SpanCorruption` does.

    Defaults: loss_on "targets" (ours).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import FillInMiddle, Sentinels
        >>> words = Sentinels(masks=(100,), separator=102, end_of_span=103, end_of_text=99)
        >>> FillInMiddle(words)([1, 2, 3], generator=torch.Generator().manual_seed(1)).input_ids
        array([  1, 100,  99, 102, 100,   2,   3, 103], dtype=int32)
    """

    def __init__(
        self, sentinels: Sentinels, *, loss_on: str = "targets", max_length: int | None = None
    ):
        _check_loss_on(loss_on)
        self.sentinels, self.loss_on, self.max_length = sentinels, loss_on, max_length

    def __call__(
        self, ids: Any, document_ids: Any = None, *, generator: torch.Generator
    ) -> Example:
        def spans(n: int) -> Spans:
            return [tuple(_choose(n + 1, 2, generator))]

        return _rewritten(ids, document_ids, self.sentinels, spans, self.loss_on, self.max_length)


class Mixture:
    """One of several transforms for each sequence, drawn with its probability.

    Raises ValueError for probabilities that are negative or do not add up to 1.

    Defaults: none; the paper's is one half `CausalLM`, one half `SpanCorruption`.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import CausalLM, Mixture, PrefixLM
        >>> mixture = Mixture([(0.5, CausalLM()), (0.5, PrefixLM())])
        >>> example = mixture([5, 6, 7], generator=torch.Generator().manual_seed(0))
        >>> len(example.input_ids)
        3
    """

    def __init__(self, parts: Sequence[tuple[float, Transform]]):
        shares = [share for share, _ in parts]
        if not parts or min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise ValueError(f"the probabilities of a mixture must add up to 1, got {shares}")
        self.upto = np.cumsum(shares)
        self.transforms = [transform for _, transform in parts]

    def __call__(
        self, ids: Any, document_ids: Any = None, *, generator: torch.Generator
    ) -> Example:
        at = torch.rand((), generator=generator, dtype=torch.float64).item() * self.upto[-1]
        chosen = self.transforms[int(np.searchsorted(self.upto, at, side="right"))]
        return chosen(ids, document_ids, generator=generator)


def restore(example: Example, sentinels: Sentinels) -> np.ndarray:
    """The ids that an example was made of: spans back in their places, sentinels gone.

    Returns int32 [n], for packed documents one after the other. Raises ValueError for ids that no
    transform here has made of a document.

    Defaults: none.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import FillInMiddle, Sentinels, restore
        >>> words = Sentinels(masks=(100,), separator=102, end_of_span=103, end_of_text=99)
        >>> example = FillInMiddle(words)([1, 2, 3], generator=torch.Generator().manual_seed(1))
        >>> restore(example, words)
        array([1, 2, 3], dtype=int32)
    """
    _, pieces = _documents(example.input_ids, example.document_ids)
    return np.concatenate([_restored(piece.tolist(), sentinels) for piece in pieces])


def _restored(stream: list[int], sentinels: Sentinels) -> np.ndarray:
    spans: dict[int, list[int]] = {}
    body = stream
    if sentinels.separator in stream:
        at = stream.index(sentinels.separator)
        if at == 0 or stream[at - 1] != sentinels.end_of_text:
            raise ValueError("the separator does not follow the end of a text")
        body, targets = stream[: at - 1], stream[at + 1 :]
        while targets:
            if targets[0] in spans or sentinels.end_of_span not in targets:
                raise ValueError(f"after the separator, {targets[:4]} ... opens no whole span")
            end = targets.index(sentinels.end_of_span)
            spans[targets[0]] = targets[1:end]
            targets = targets[end + 1 :]
    masks = [token for token in body if token in sentinels.masks]
    if masks != list(spans) or masks != list(sentinels.masks[: len(masks)]):
        raise ValueError(f"the masks are {masks} in the text and {list(spans)} after it")
    whole = [piece for token in body for piece in spans.get(token, [token])]
    return np.asarray(whole, dtype=np.int32)


def _documents(ids: Any, document_ids: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """The ids as int32 [n], and its documents one by one."""
    ids = np.asarray(ids, dtype=np.int32)
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"expected ids [n] of at least two tokens, got shape {ids.shape}")
    if document_ids is None:
        return ids, [ids]
    documents = np.asarray(document_ids)
    if documents.shape != ids.shape:
        raise ValueError(f"{ids.shape} ids and {documents.shape} document_ids: one a token")
    return ids, np.split(ids, np.flatnonzero(np.diff(documents)) + 1)


def _rewritten(
    ids: Any,
    document_ids: Any,
    sentinels: Sentinels,
    spans_of: Callable[[int], Spans],
    loss_on: str,
    max_length: int | None,
) -> Example:
    ids, pieces = _documents(ids, document_ids)
    reserved = np.isin(ids, (*sentinels.masks, sentinels.separator, sentinels.end_of_span))
    if reserved.any():
        raise ValueError(f"id {ids[reserved][0]} of the text is a sentinel: text has none of them")
    streams, losses, targets_at = [], [], None
    for piece in pieces:
        stream, loss, targets_at = _cut(piece.tolist(), spans_of(len(piece)), sentinels, loss_on)
        streams.append(stream)
        losses.append(loss)
    total = sum(map(len, streams))
    if max_length is not None and total > max_length:
        raise ValueError(
            f"{len(ids)} tokens become {total}, above max_length {max_length}: give fewer, so that "
            "no target is cut"
        )
    documents = np.repeat(np.arange(len(pieces), dtype=np.int32), list(map(len, streams)))
    return Example(
        np.asarray(list(chain.from_iterable(streams)), dtype=np.int32),
        np.asarray(list(chain.from_iterable(losses)), dtype=bool),
        prefix_length=targets_at if len(pieces) == 1 else None,
        document_ids=documents if document_ids is not None else None,
    )


def _cut(
    ids: list[int], spans: Spans, sentinels: Sentinels, loss_on: str
) -> tuple[list[int], list[bool], int | None]:
    """The stream of one document, where its loss is, and where its targets begin."""
    if not spans:
        return ids, [True] * len(ids), None
    body, targets, loss, end = [], [], [], 0
    for mask, (start, stop) in zip(sentinels.masks, spans, strict=False):
        body += [*ids[end:start], mask]
        targets += [mask, *ids[start:stop], sentinels.end_of_span]
        loss += [False] + [True] * (stop - start + 1)
        end = stop
    body += [*ids[end:], sentinels.end_of_text, sentinels.separator]
    return body + targets, [loss_on == "all"] * len(body) + loss, len(body)


def _choose(n: int, k: int, generator: torch.Generator) -> list[int]:
    """k of range(n) in order, every choice as likely as any other."""
    return torch.randperm(n, generator=generator)[:k].sort().values.tolist()


def _check_loss_on(loss_on: str) -> None:
    if loss_on not in ("targets", "all"):
        raise ValueError(f"loss_on must be 'targets' or 'all', got {loss_on!r}")
