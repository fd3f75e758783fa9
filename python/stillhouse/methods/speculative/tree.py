"""What a drafter proposes: a tree of tokens behind the last committed one, and how it was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

# How a node was proposed, which decides how it must be verified (`ops.tree_verify`).
WITHOUT_REPLACEMENT, IID, DETERMINISTIC, BEHIND_DETERMINISTIC = range(4)
PADDING = -2
_PARTS = (("tokens", torch.int32), ("parents", torch.int32), ("kind", torch.uint8))


@dataclass(frozen=True, eq=False)
class DraftTree:
    """The draft of one sequence; node 0 is the root, with the token that was committed last.

    tokens: int32 [T] and parents: int32 [T] on the CPU; parents[0] = -1, and each other node comes
    after its parent. kind: uint8 [T], how each node was proposed: 0 sampled without replacement
    from its parent's proposal, 1 drawn independently, 2 deterministic, 3 sampled without
    replacement from the proposal without its deterministic siblings' tokens; the root's is not
    read. log_probs: float [T, V], row i the proposal of node i's children, on any device; None
    where all nodes are deterministic. scores: float [T] or None, what the drafter ranked by.
    Raises TypeError and ValueError for tensors that are no tree, and where a sampled node comes
    without log_probs: a draft whose law is not known cannot be verified exactly.

    Example:
        >>> import torch
        >>> from stillhouse.methods.speculative import DraftTree
        >>> tree = DraftTree.of([7, 1, 2, 3], [-1, 0, 0, 1])
        >>> len(tree), tree.parents.tolist()
        (4, [-1, 0, 0, 1])
    """

    tokens: Tensor
    parents: Tensor
    kind: Tensor
    log_probs: Tensor | None = None
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        for name, dtype in _PARTS:
            part = getattr(self, name)
            if not isinstance(part, Tensor) or part.dtype != dtype or not part.is_cpu:
                found = f"{part.dtype} on {part.device}" if isinstance(part, Tensor) else type(part)
                raise TypeError(f"expected {name} to be {dtype} on the CPU, got {found}")
            if part.dim() != 1 or len(part) != len(self.tokens) or len(part) == 0:
                raise ValueError(
                    f"expected {name} [T] with T >= 1 as tokens {list(self.tokens.shape)}, "
                    f"got {list(part.shape)}"
                )
        # Once a round, of a tree that took 25 us to make: as few passes as will do.
        tokens, parents, kind = self.tokens.numpy(), self.parents.numpy(), self.kind.numpy()
        place = np.arange(1, len(tokens), dtype=np.uint32)
        # As unsigned numbers those below 0 are above any place.
        if parents[0] != -1 or not (parents[1:].astype(np.uint32) < place).all():
            raise ValueError(
                f"expected parents[0] = -1 and 0 <= parents[i] < i, got {parents.tolist()}"
            )
        if tokens.min() < 0:
            raise ValueError(f"expected token ids >= 0, got {tokens.min()}")
        if kind.max() > BEHIND_DETERMINISTIC:
            raise ValueError(f"expected kinds 0 to 3, got {kind.max()}")
        self._check_rows(tokens, kind)

    def _check_rows(self, tokens: np.ndarray, kind: np.ndarray) -> None:
        """What is given for each node."""
        rows, scores = self.log_probs, self.scores
        if rows is None:
            if (kind[1:] != DETERMINISTIC).any():
                raise ValueError(
                    "a sampled node (kind 0, 1 or 3) needs log_probs, the law it was drawn from"
                )
        elif rows.dim() != 2 or len(rows) != len(tokens) or not rows.is_floating_point():
            raise ValueError(
                f"expected log_probs float [T, V] with T = {len(tokens)}, got {rows.dtype} "
                f"{list(rows.shape)}"
            )
        elif tokens.max() >= rows.shape[1]:
            raise ValueError(
                f"expected token ids below the {rows.shape[1]} columns of log_probs, "
                f"got {tokens.max()}: drafter and target need one vocabulary"
            )
        if scores is not None and scores.shape != self.tokens.shape:
            raise ValueError(f"expected scores [{len(tokens)}], got {list(scores.shape)}")

    @classmethod
    def of(
        cls,
        tokens: Sequence[int] | np.ndarray,
        parents: Sequence[int] | np.ndarray,
        *,
        kind: int = DETERMINISTIC,
        log_probs: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> DraftTree:
        """A tree all of whose nodes are of one kind, from lists or arrays."""
        ids = torch.as_tensor(tokens, dtype=torch.int32)
        kinds = torch.full(ids.shape, kind, dtype=torch.uint8)
        return cls(ids, torch.as_tensor(parents, dtype=torch.int32), kinds, log_probs, scores)

    @classmethod
    def chain(
        cls,
        tokens: Sequence[int] | np.ndarray,
        *,
        kind: int = DETERMINISTIC,
        log_probs: Tensor | None = None,
    ) -> DraftTree:
        """Root and one path; the root alone drafts nothing, which is a plain decoding step."""
        return cls.of(tokens, range(-1, len(tokens) - 1), kind=kind, log_probs=log_probs)

    def __len__(self) -> int:
        """T, the root included."""
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class DraftState:
    """What a drafter may know before a round, of one sequence.

    ids: int64 [n], everything committed so far, prompt included; its last token is the root.
    seed, position: key of the round's random numbers, with position = n: what a drafter draws with
    them (stream 2) repeats whatever else is in the batch. temperature: the target's; 0 is greedy.
    row: which sequence of the batch. step: rounds of this generation so far; at 0 the sequence is
    new. room: the most nodes behind the root that are worth verifying, None where there is no
    limit. depth: the most tokens behind the root that can still be used, None likewise.
    hidden: float [m, H], what the target's output head read at the last m committed tokens before
    the root, those since the last draft of more than a root (at first the whole prompt's); for
    drafters whose `needs_features` is True, else None.
    """

    ids: Tensor
    seed: int = 0
    position: int = 0
    temperature: float = 0.0
    row: int = 0
    step: int = 0
    room: int | None = None
    depth: int | None = None
    hidden: Tensor | None = None


@runtime_checkable
class Drafter(Protocol):
    """Proposes what the target verifies. Whatever it proposes, the output's law is the target's.

    A drafter that reads the target's features says so: `needs_features = True`.
    """

    def draft(self, state: DraftState) -> DraftTree:
        """The tree behind the last of `state.ids`; the root alone where nothing is worth a try."""
        ...

    def accept(self, ids: Tensor) -> None:
        """Told what a round has committed, int64 [k]: the accepted tokens and the final one."""
        ...


def batch_trees(
    trees: Sequence[DraftTree], *, size: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Trees of one batch, side by side: tokens, parents, kind [B, T] and draft [B, T, V] or None.

    Shorter trees are padded at the end with parent -2, token 0 and kind 2. T is the longest tree's,
    or `size` where one shape is wanted for all rounds. draft has the trees' log_probs in float32,
    on their device; rows that no tree gave are 0 and never read; None where no tree has any.
    Raises ValueError for no trees, for a tree longer than size, and for different vocabularies.

    Example:
        >>> from stillhouse.methods.speculative import DraftTree, batch_trees
        >>> trees = [DraftTree.chain([7, 1, 2]), DraftTree.chain([4])]
        >>> tokens, parents, kind, draft = batch_trees(trees)
        >>> parents.tolist(), draft
        ([[-1, 0, 1], [-1, -2, -2]], None)
    """
    if not trees:
        raise ValueError("expected at least one tree")
    longest = max(map(len, trees))
    if size is None:
        size = longest
    elif longest > size:
        raise ValueError(f"expected trees of at most size = {size} nodes, got {longest}")
    tokens = torch.zeros(len(trees), size, dtype=torch.int32)
    parents = torch.full_like(tokens, PADDING)
    kind = torch.full(tokens.shape, DETERMINISTIC, dtype=torch.uint8)
    given = [tree.log_probs for tree in trees if tree.log_probs is not None]
    draft = None
    if given:
        widths = sorted({rows.shape[1] for rows in given})
        if len(widths) > 1:
            raise ValueError(f"expected one vocabulary for all trees, got {widths}")
        shape = len(trees), size, widths[0]
        draft = torch.zeros(shape, dtype=torch.float32, device=given[0].device)
    for row, tree in enumerate(trees):
        tokens[row, : len(tree)] = tree.tokens
        parents[row, : len(tree)] = tree.parents
        kind[row, : len(tree)] = tree.kind
        if tree.log_probs is not None:
            draft[row, : len(tree)] = tree.log_probs
    return tokens, parents, kind, draft
