"""Transforms of a sequence that keep its tokens: as it is, after a prefix, or one that is drawn."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from stillhouse.methods.language.packed_documents import split_documents
from stillhouse.train.examples import Example

Transform = Callable[..., Example]


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
        ids, _ = split_documents(ids, document_ids)
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
        ids, pieces = split_documents(ids, document_ids)
        if len(pieces) > 1:
            raise ValueError(f"a prefix is of one document, got {len(pieces)}")
        given = int(torch.randint(1, len(ids), (), generator=generator))
        documents = None if document_ids is None else np.asarray(document_ids, dtype=np.int32)
        mask = np.arange(len(ids)) >= given
        return Example(ids, mask, prefix_length=given, document_ids=documents)


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
