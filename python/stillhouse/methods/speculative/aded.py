"""ADED: a tri-gram table stands for the draft model, and a tree search decides what to draft.

Which tokens follow a pair is counted in a corpus and, while text is generated, in the text itself:
each step strengthens the tri-grams of its last 16 tokens. A Monte-Carlo tree search over the table
weighs likely continuations against those not yet looked at and leaves a tree, which the target
verifies in one pass. No network, no training, and the draft follows what is being written.

Equation, c the counts of a corpus, h the occurrences in windows of the text being written, S and n
a node's sum of values and visits, P its score, N its parent's visits:

    score(x | a, b) = min(c(a, b, x) / sum_y c(a, b, y) + step h(a, b, x), cap)

    PUCT = S / n + (c1 + log((N + c2 + 1) / c2)) P sqrt(N) / (1 + n),   infinite for n = 0

    value of a sentence = 1 + sum of the scores of its steps

Paper: Adaptive Draft-Verification for Efficient LLM Decoding, AAAI 2025, arXiv 2407.12021. Code by
its authors: liuxukun2000/Adaptix.

Where we differ from their code: with a temperature they draw once for each candidate and keep the
longest match, which favours the draft; our trees are verified by `ops.tree_verify`, whose output
has the target's law. Their rollout looks up a token that is already in the pair, ours the new one;
that the value counts all steps of a sentence is our reading. Their choices depend on the order of a
hash map; ours follow the higher score, then the lower token, and rollouts are keyed by (seed,
position). Too large a tree loses its least visited leaves, not its longest sequences. Where nothing
is known we draft nothing. Their table grows without bound; ours forgets the pairs that have not
occurred for longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from stillhouse import _draft
from stillhouse.methods.speculative.ngram import NGramDrafter, as_tree
from stillhouse.methods.speculative.token_ids import token_array
from stillhouse.methods.speculative.tree import DraftState, DraftTree
from stillhouse.ops.tree_reference import MOST_DEPTH

__all__ = ["BeamDrafter", "MCTSDrafter", "NGramDrafter", "TrigramTable"]

Ids = Tensor | np.ndarray | Sequence[int]


class TrigramTable:
    """Scores of the tokens that follow a pair of tokens, counted in texts and strengthened online.

    successors: how many tokens a pair keeps, those with the highest scores; of equal ones the lower
    ids. One more is remembered unseen, so that a token new to a full pair can rise. step, cap: what
    an occurrence adds online, and where a score ends. capacity: the most pairs, of which those that
    have not occurred for longest are forgotten. vocab_size: ids from there on are refused; None
    accepts all of int32. Threads may add, update, draft and save at once.
    Raises ValueError for sizes out of range and for ids below 0 or from vocab_size on, TypeError
    for ids that are not integers.

    Defaults: 12 successors, step 0.04, cap 3 (the authors' code); capacity 2^20 pairs, some 250 MB,
    and 450 MB where pairs have grown together.

    Example:
        >>> from stillhouse.methods.speculative import TrigramTable
        >>> table = TrigramTable()
        >>> a, b, c, d = range(4)
        >>> table.add([a, b, c, a, b, d, a, b, c])
        >>> {token: round(score, 4) for token, score in table.probs(a, b).items()}
        {2: 0.6667, 3: 0.3333}
        >>> table.update([a, b, d])
        >>> round(table.probs(a, b)[d], 4)
        0.3733
    """

    def __init__(
        self,
        successors: int = 12,
        step: float = 0.04,
        cap: float = 3.0,
        *,
        capacity: int = 2**20,
        vocab_size: int | None = None,
    ):
        if vocab_size is not None and not 1 <= vocab_size < 2**31:
            raise ValueError(f"expected vocab_size in [1, 2^31), got {vocab_size}")
        self._table = _draft.TrigramTable(successors, step, cap, capacity, vocab_size or 0)

    def add(self, tokens: Ids) -> None:
        """Counts the tri-grams of a text, ids [n]; shorter than three tokens it has none."""
        self._table.add([token_array(tokens)])

    def build(self, corpus: Iterable[Ids], *, chunk: int = 2**22) -> TrigramTable:
        """Counts many texts, and returns the table. Tri-grams do not reach into the next text.

        About `chunk` tokens at a time are counted exactly, with 24 bytes of memory each; what a
        pair drops after one chunk is not there when the next one is added.
        """
        texts, size = [], 0
        for text in corpus:
            texts.append(token_array(text))
            size += texts[-1].size
            if size >= chunk:
                self._table.add(texts)
                texts, size = [], 0
        self._table.add(texts)
        return self

    def update(self, window: Ids) -> None:
        """Strengthens each tri-gram of a window of the text being written, ids [n], by `step`."""
        self._table.update(token_array(window))

    def probs(self, a: int, b: int) -> dict[int, float]:
        """The scores of the tokens that follow (a, b), best first; they need not sum to 1."""
        tokens, scores = self._table.successors_of(a, b)
        return dict(zip(tokens.tolist(), scores.tolist(), strict=True))

    def save(self, path: str | Path) -> None:
        """Writes the table, with a checksum, to a temporary name that is then renamed."""
        self._table.save(str(path))

    @classmethod
    def load(cls, path: str | Path) -> TrigramTable:
        """What `save` has written. Raises ValueError for a file that is corrupted, of another
        version or no table, OSError for one that cannot be read."""
        table = cls.__new__(cls)
        table._table = _draft.TrigramTable.load(str(path))
        return table

    def __len__(self) -> int:
        """Pairs that are known."""
        return len(self._table)

    @property
    def nbytes(self) -> int:
        """Bytes that the table holds, spare room included."""
        return self._table.nbytes


class MCTSDrafter:
    """Drafts by Monte-Carlo tree search over a tri-gram table, which it adapts as it goes.

    `draft` first strengthens the tri-grams of the last `window` tokens of the context (adapt=False
    leaves the table alone), then searches from its last pair: each iteration follows the highest
    PUCT to a leaf, adds all its successors and rolls out to `depth` tokens. The `keep` most visited
    nodes, each with its best successor, are the draft, without its least visited leaves where that
    is more than max_nodes, the root included. Nodes are deterministic (kind 2), their scores are
    visits. A context of one token, and a pair that the table does not know, draft nothing. The same
    table, context and state.seed give the same draft. Several drafters may share a table.
    Raises ValueError for iterations, depth, keep or max_nodes below 1, for more than 2^20
    iterations or a depth above 63, for c1 < 0, c2 <= 0 and window < 0, and for token ids that the
    table refuses.

    Defaults: 150 iterations, 3 tokens deep, 24 kept, c1 32, c2 8 (paper and code), window 16 and
    64 nodes (code, which has the root beside them).

    Example:
        >>> import torch
        >>> from stillhouse.methods.speculative import DraftState, MCTSDrafter, TrigramTable
        >>> drafter = MCTSDrafter(TrigramTable())
        >>> tree = drafter.draft(DraftState(torch.tensor([1, 2, 3, 4, 1, 2])))
        >>> tree.tokens.tolist(), tree.parents.tolist()
        ([2, 3, 4, 1, 2], [-1, 0, 1, 2, 3])
    """

    def __init__(
        self,
        table: TrigramTable,
        *,
        iterations: int = 150,
        depth: int = 3,
        keep: int = 24,
        max_nodes: int = 64,
        c1: float = 32.0,
        c2: float = 8.0,
        window: int = 16,
        adapt: bool = True,
    ):
        if window < 0:
            raise ValueError(f"expected window >= 0, got {window}")
        self.table, self.window, self.adapt = table, window, adapt
        options = dict(iterations=iterations, depth=depth, keep=keep, max_nodes=max_nodes)
        self._search = _draft.Search(table._table, **options, c1=c1, c2=c2)

    def draft(self, state: DraftState) -> DraftTree:
        """The tree behind the last of state.ids, random numbers keyed by state.seed and length."""
        tail = tail_of(state, self.table, self.window, adapt=self.adapt)
        found = self._search.draft(tail, state.seed % 2**64, len(state.ids))
        return as_tree(*found)

    def accept(self, ids: Tensor) -> None:
        """Nothing to do: `draft` adapts the table to whatever the context ends with."""


class BeamDrafter:
    """Drafts from the same table by beam search: the baseline that the tree search is held against.

    Level by level the `width` continuations with the highest product of normalised scores are
    followed; of all that were looked at the max_nodes best stay, the root included. width 1 is
    greedy. Nodes are deterministic (kind 2), scores cumulative log-probabilities.
    Raises ValueError for depth, width or max_nodes below 1, depth above 64, window below 0, and for
    token ids that the table refuses.

    Defaults: 4 tokens deep, width 24, 64 nodes, window 16: the size of `MCTSDrafter`'s trees.

    Example:
        >>> import torch
        >>> from stillhouse.methods.speculative import BeamDrafter, DraftState, TrigramTable
        >>> drafter = BeamDrafter(TrigramTable(), depth=2)
        >>> drafter.draft(DraftState(torch.tensor([1, 2, 3, 4, 1, 2]))).tokens.tolist()
        [2, 3, 4]
    """

    def __init__(
        self,
        table: TrigramTable,
        *,
        depth: int = 4,
        width: int = 24,
        max_nodes: int = 64,
        window: int = 16,
        adapt: bool = True,
    ):
        for name, value in (("depth", depth), ("width", width), ("max_nodes", max_nodes)):
            if value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")
        if depth > MOST_DEPTH:
            raise ValueError(f"expected depth of at most {MOST_DEPTH}, got {depth}")
        if window < 0:
            raise ValueError(f"expected window >= 0, got {window}")
        self.table, self.window, self.adapt = table, window, adapt
        self.depth, self.width, self.max_nodes = depth, width, max_nodes

    def draft(self, state: DraftState) -> DraftTree:
        """The tree behind the last of state.ids."""
        tail = tail_of(state, self.table, self.window, adapt=self.adapt)
        return as_tree(*self.table._table.beam(tail, self.depth, self.width, self.max_nodes))

    def accept(self, ids: Tensor) -> None:
        """Nothing to do: `draft` adapts the table to whatever the context ends with."""


def tail_of(state: DraftState, table: TrigramTable, window: int, *, adapt: bool) -> np.ndarray:
    """The end of the context, int32, after the table has been adapted to it."""
    tail = token_array(state.ids[-max(window, 2) :])
    if adapt:
        table._table.update(tail[len(tail) - min(window, len(tail)) :])
    return tail
