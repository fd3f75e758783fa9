"""Phrases of a text: where they begin and end, in characters and in tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Spans = list[tuple[int, int]]

# Words that separate phrases and belong to none.
_STOP = """
a about after all also an and any are as at be because been before being between both but by
can could did do does during each either for from had has have he her his how i if in into is
it its may might more most must neither no nor not of on one only or other our over she
should since so some such than that the their them then there these they this those through
to under until up was we were what when where which while who whose will with without would
you your
"""
STOP_WORDS = frozenset(_STOP.split())
# A word, or a mark that no phrase goes across.
_PIECE = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]|\n")


def phrase_spans(text: str) -> Spans:
    """Runs of words between stop words, punctuation and line ends: [(start, end)] in characters,
    end excluded, in order.

    A chunker without a model: it knows no grammar, and English stop words only. Raises nothing: a
    text without words has no span. Defaults: ours; the paper's sentence splitter finds no phrases.

    Example:
        >>> from stillhouse.methods.language import phrase_spans
        >>> text = "The old kiln of the malt house burned down, twice."
        >>> [text[start:end] for start, end in phrase_spans(text)]
        ['old kiln', 'malt house burned down', 'twice']
    """
    spans: Spans = []
    is_open = False
    for piece in _PIECE.finditer(text):
        word = piece.group()
        if not (word[0].isalnum() or word[0] == "_") or word.lower() in STOP_WORDS:
            is_open = False
        elif is_open:
            spans[-1] = spans[-1][0], piece.end()
        else:
            spans.append(piece.span())
            is_open = True
    return spans


def token_spans(pieces: Sequence[str], chunker: Callable[[str], Spans] = phrase_spans) -> Spans:
    """The chunker's spans of the text that `pieces`, the tokens' own texts, make up, in tokens.

    A token belongs to the span that holds its first character that is not blank: with the blank in
    front, as vocabularies have it, a span would lose its first token. Spans without a token are
    left out.
    """
    starts, position = [], 0
    for piece in pieces:
        starts.append(position + len(piece) - len(piece.lstrip()))
        position += len(piece)
    result: Spans = []
    token = 0
    for start, end in chunker("".join(pieces)):
        while token < len(pieces) and starts[token] < start:
            token += 1
        first = token
        while token < len(pieces) and starts[token] < end:
            token += 1
        if token > first:
            result.append((first, token))
    return result
