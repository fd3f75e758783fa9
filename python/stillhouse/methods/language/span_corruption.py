"""The transforms that hide spans of a document and ask for them at its end: CodeGen2's format.

Of a document d with the spans s_1 .. s_M cut out (arXiv 2305.02309 and its model card):

    d with <mask_m> for each s_m, <|endoftext|> <sep>, then <mask_m> s_m <eom> for each m

Each document of a packed sequence is rewritten on its own, its spans numbered from 1. The code of
the corruption was never released. The format is the model card's; how many spans and how long, and
that the loss is on what follows <sep>, is our reading.
"""

from __future__ import annotations

from typing import Any

import torch

from stillhouse.methods.language.sentinels import Sentinels
from stillhouse.methods.language.splicing import Spans, check_loss_on, rewritten
from stillhouse.train.examples import Example


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
        check_loss_on(loss_on)
        self.sentinels, self.ratio, self.mean_span = sentinels, ratio, mean_span
        self.minimum, self.loss_on, self.max_length = minimum, loss_on, max_length

    def __call__(
        self, ids: Any, document_ids: Any = None, *, generator: torch.Generator
    ) -> Example:
        def spans(n: int) -> Spans:
            return self._spans(n, generator) if n >= self.minimum else []

        return rewritten(ids, document_ids, self.sentinels, spans, self.loss_on, self.max_length)

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
        check_loss_on(loss_on)
        self.sentinels, self.loss_on, self.max_length = sentinels, loss_on, max_length

    def __call__(
        self, ids: Any, document_ids: Any = None, *, generator: torch.Generator
    ) -> Example:
        def spans(n: int) -> Spans:
            return [tuple(_choose(n + 1, 2, generator))]

        return rewritten(ids, document_ids, self.sentinels, spans, self.loss_on, self.max_length)


def _choose(n: int, k: int, generator: torch.Generator) -> list[int]:
    """k of range(n) in order, every choice as likely as any other."""
    return sorted(torch.randperm(n, generator=generator)[:k].tolist())
