"""Draft trees out of log-probabilities: of a fixed shape, or grown where they are highest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stillhouse import _draft


class Level(NamedTuple):
    """Children of the F nodes of a frontier: tokens, parents (places in the frontier, -1 for what
    is missing) and cumulative scores [B, F k]; frontier int32 [B, width], the best of them by
    place, best first, -1 where there are fewer."""

    tokens: np.ndarray
    parents: np.ndarray
    scores: np.ndarray
    frontier: np.ndarray


def expand_level(log_probs: np.ndarray, scores: np.ndarray, k: int, *, width: int) -> Level:
    """The k best tokens after each node of a frontier, and which of all of them to go on from.

    log_probs: float32 [B, F, V], a row for each node of the frontier; scores: float32 [B, F], its
    cumulative log-probability, -inf for a place that is not used. Tokens with -inf or NaN are never
    taken; of equal ones the lower id is. Raises TypeError for other dtypes or layouts, ValueError
    for shapes that do not match, k outside [1, V] and width outside [1, F k].

    Example:
        >>> import numpy as np
        >>> from stillhouse.methods.speculative import expand_level
        >>> rows = np.log(np.float32([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]]))
        >>> level = expand_level(rows, np.log(np.float32([[0.7, 0.3]])), 2, width=2)
        >>> level.tokens.tolist(), level.parents.tolist(), level.frontier.tolist()
        ([[0, 1, 2, 0]], [[0, 0, 1, 1]], [[0, 2]])
    """
    return Level(*_draft.expand(log_probs, scores, k, width))


def dynamic_tree(
    tokens: np.ndarray, parents: np.ndarray, scores: np.ndarray, *, total: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The `total` best nodes of those that all levels have proposed, closed under parents.

    tokens, parents int32 [B, N] and scores float32 [B, N]: node 0 is the root, parents come first,
    -2 is padding, scores are cumulative. A node counts as its worst ancestor does, which changes
    nothing for cumulative scores. Returns tokens, parents and scores [B, total], the chosen nodes
    in their order, padded with parent -2, and chosen int32 [B, total]: which they were, -1 padded.
    Raises TypeError for other dtypes or layouts, ValueError for shapes that do not match, parents
    that are no tree, NaN scores and total < 1.

    Equation (EAGLE-2, arXiv 2406.16858, expansion and reranking): score(i) = sum of log q along the
    path to i.

    Example:
        >>> import numpy as np
        >>> from stillhouse.methods.speculative import dynamic_tree
        >>> tokens, parents = np.int32([[9, 4, 5, 6, 7]]), np.int32([[-1, 0, 0, 1, 2]])
        >>> scores = np.float32([[0, -0.5, -1.2, -0.6, -3.0]])
        >>> kept = dynamic_tree(tokens, parents, scores, total=4)
        >>> kept[0].tolist(), kept[1].tolist()
        ([[9, 4, 5, 6]], [[-1, 0, 0, 1]])
    """
    return _draft.dynamic_tree(tokens, parents, scores, total)


def static_tree(
    roots: np.ndarray, log_probs: np.ndarray, paths: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A tree of one shape for all sequences: each path names ranks, level by level.

    roots: int32 [B]; log_probs: float32 [B, D, V], row d the law of all tokens at depth d + 1.
    paths: (0, 2) is the third best token of row 1 behind the best of row 0; its beginning (0,) must
    be a path too. Returns tokens int32 [B, T], parents int32 [T] and cumulative scores float32
    [B, T], the root first, then level by level in order of rank. Raises TypeError for other dtypes
    or layouts, ValueError for a path without its beginning, given twice, deeper than D or with a
    rank outside [0, V).

    Example:
        >>> import numpy as np
        >>> from stillhouse.methods.speculative import static_tree
        >>> rows = np.log(np.float32([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]]))
        >>> tokens, parents, _ = static_tree(np.int32([7]), rows, [(0,), (1,), (0, 0)])
        >>> tokens.tolist(), parents.tolist()
        ([[7, 0, 1, 2]], [-1, 0, 0, 1])
    """
    order = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
    place = {(): 0}
    for path in order:
        if path in place:
            raise ValueError(f"expected each path once, got {path} again")
        if path[:-1] not in place:
            raise ValueError(f"expected the path {path[:-1]} that {path} goes on from")
        place[path] = len(place)
    parents = np.array([-1, *(place[path[:-1]] for path in order)], np.int32)
    ranks = np.array([0, *(path[-1] for path in order)], np.int32)
    tokens, scores = _draft.static_tree(roots, log_probs, parents, ranks)
    return tokens, parents, scores
