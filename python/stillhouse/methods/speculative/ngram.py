"""Prompt lookup: what followed the last tokens when they occurred before is what may follow now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stillhouse import _draft
from stillhouse.methods.speculative.token_ids import token_array
from stillhouse.methods.speculative.tree import DraftState, DraftTree


class NGramDrafter:
    """Drafts the continuation of the longest n-gram that ends the context and occurred before.

    It looks in the context itself and, behind that, in texts given by `add`, of which the last
    `capacity` tokens are kept. Of equally long matches the most recent comes first; branches > 1
    merges the continuations of several into a tree. A match near the context's end goes on
    periodically: text that repeats itself is drafted to the full length. Nodes are deterministic
    (kind 2); their scores are the lengths of the matches. Threads may add and draft at once.
    longest, shortest: tokens of an n-gram, at most 16. length: tokens of a continuation. max_nodes:
    nodes of a tree, the root included. Raises ValueError for sizes out of range and for token ids
    below 0, TypeError for ids that are not integers.

    Defaults: 3 to 1 tokens matched, 10 drafted, one branch (prompt lookup decoding's own demo).

    Example:
        >>> import torch
        >>> from stillhouse.methods.speculative import DraftState, NGramDrafter
        >>> drafter = NGramDrafter(length=3)
        >>> drafter.draft(DraftState(torch.tensor([5, 6, 7, 8, 9, 5, 6]))).tokens.tolist()
        [6, 7, 8, 9]
        >>> drafter.add([9, 1, 2, 3])
        >>> drafter.draft(DraftState(torch.tensor([4, 9]))).tokens.tolist()
        [9, 1, 2, 3]
    """

    def __init__(
        self,
        longest: int = 3,
        shortest: int = 1,
        length: int = 10,
        *,
        branches: int = 1,
        max_nodes: int = 64,
        capacity: int = 2**20,
    ):
        for name, value in (("length", length), ("branches", branches), ("max_nodes", max_nodes)):
            if value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")
        self.length, self.branches, self.max_nodes = length, branches, max_nodes
        self._table = _draft.NGramTable(shortest, longest, capacity)

    def add(self, tokens: Tensor | np.ndarray | Sequence[int]) -> None:
        """An earlier text, ids [n]; the oldest tokens beyond `capacity` are forgotten."""
        self._table.add(token_array(tokens))

    def draft(self, state: DraftState) -> DraftTree:
        """The tree behind the last of state.ids; the root alone where nothing matches."""
        found = self._table.draft(
            token_array(state.ids), self.length, self.branches, self.max_nodes
        )
        return as_tree(*found)

    def accept(self, ids: Tensor) -> None:
        """Nothing to learn: the next state has the accepted tokens in its context."""

    def save(self, path: str | Path) -> None:
        """Writes the texts and sizes, to a temporary name that is then renamed."""
        self._table.save(str(path))

    @classmethod
    def load(cls, path: str | Path, **options: int) -> NGramDrafter:
        """What `save` has written; options are length, branches and max_nodes.

        Raises ValueError for a file that is corrupted or no n-gram table.
        """
        drafter = cls(capacity=2, **options)
        drafter._table = _draft.NGramTable.load(str(path))
        return drafter

    def __len__(self) -> int:
        """Tokens kept of earlier texts, with one more in front of each text."""
        return len(self._table)

    @property
    def nbytes(self) -> int:
        """Bytes of the texts and their index, of a fixed size."""
        return self._table.nbytes


def as_tree(tokens: np.ndarray, parents: np.ndarray, scores: np.ndarray) -> DraftTree:
    """A deterministic tree of what a table has found."""
    return DraftTree.of(
        torch.from_numpy(tokens), torch.from_numpy(parents), scores=torch.from_numpy(scores)
    )
