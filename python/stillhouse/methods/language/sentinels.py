"""The tokens that stand for cut-out spans, and the way back to the text that they were cut from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from stillhouse.methods.language.packed_documents import split_documents
from stillhouse.train.examples import Example


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
    _, pieces = split_documents(example.input_ids, example.document_ids)
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
