"""Spans cut out of a document and put behind it, each after the mask that stands for it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np

from stillhouse.methods.language.packed_documents import split_documents
from stillhouse.methods.language.sentinels import Sentinels
from stillhouse.train.examples import Example

Spans = list[tuple[int, int]]


def rewritten(
    ids: Any,
    document_ids: Any,
    sentinels: Sentinels,
    spans_of: Callable[[int], Spans],
    loss_on: str,
    max_length: int | None,
) -> Example:
    ids, pieces = split_documents(ids, document_ids)
    reserved = {*sentinels.masks, sentinels.separator, sentinels.end_of_span}
    taken = reserved.intersection(ids.tolist())
    if taken:
        raise ValueError(f"id {min(taken)} of the text is a sentinel: text has none of them")
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


def check_loss_on(loss_on: str) -> None:
    if loss_on not in ("targets", "all"):
        raise ValueError(f"loss_on must be 'targets' or 'all', got {loss_on!r}")
