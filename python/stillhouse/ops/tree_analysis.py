"""What draft trees are worth: how many tokens verification accepts, exactly, in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .tree import TreeLinks
from .tree_reference import (
    DETERMINISTIC,
    IID,
    MODES,
    WITHOUT_REPLACEMENT,
    BrokenRow,
    Walk,
)
from .tree_verification import BROKEN

_SUBSETS = 16  # the largest vocabulary whose subsets are enumerated


def acceptance_bound(p, q, k: int, *, kind: int = IID) -> Tensor:
    """The largest probability with which any lossless rule accepts one of k drafts at a node.

    p, q: probabilities [V] of target and proposal. kind: 1, drafts drawn independently: 1 + min
    over sets H of P(H) - Q(H)^k, where it is enough to look at the tokens of the largest q / p, in
    O(V log V) (optimal transport with a set of drafts, SpecTr, arXiv 2310.15141). kind 0, drawn
    without replacement: all sets are looked at, for V up to 16. With k = 1 it is 1 - TV(p, q).
    Returns a float64 scalar.

    Raises ValueError for shapes that do not fit, rows that are no probabilities, k below 1 (beyond
    the support of q, without replacement) and other kinds.

    Example:
        >>> from stillhouse import ops
        >>> p, q = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]
        >>> [round(ops.acceptance_bound(p, q, k).item(), 4) for k in (1, 2)]
        [0.7, 0.86]
    """
    p, q = _probabilities("p", p), _probabilities("q", q)
    if p.shape != q.shape:
        raise ValueError(f"p and q need one vocabulary, got {p.shape[0]} and {q.shape[0]} tokens")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if kind == IID:
        ratio = np.divide(q, p, out=np.full_like(q, np.inf), where=p > 0)
        order = np.argsort(-ratio, kind="stable")
        gaps = p[order].cumsum() - q[order].cumsum() ** k
    elif kind == WITHOUT_REPLACEMENT:
        if len(p) > _SUBSETS or k > np.count_nonzero(q):
            raise ValueError(
                f"without replacement: expected at most {_SUBSETS} tokens and k up to the "
                f"{np.count_nonzero(q)} of q's support, got {len(p)} and k = {k}"
            )
        gaps = _subsets(p) - _all_in(q, k)
    else:
        raise ValueError(f"kind must be {WITHOUT_REPLACEMENT} or {IID}, got {kind}")
    return torch.tensor(1 + min(0.0, float(gaps.min())), dtype=torch.float64)


def _subsets(p: np.ndarray) -> np.ndarray:
    """Sums over all sets of tokens, [2^V]: token x is bit x of the number."""
    sums = np.zeros(1)
    for number in p:
        sums = np.concatenate([sums, sums + number])
    return sums


def _all_in(q: np.ndarray, k: int) -> np.ndarray:
    """Of each set the probability that k drafts without replacement are all in it."""
    taken, everything = _subsets(q), np.arange(2 ** len(q))
    size = np.array([bin(number).count("1") for number in everything])
    drawn = np.zeros(len(taken))  # of each set, that it is what was drawn first
    drawn[0] = 1
    for step in range(k):
        before = np.flatnonzero((size == step) & (drawn > 0))
        for token in np.flatnonzero(q):
            from_here = before[before >> token & 1 == 0]
            np.add.at(
                drawn, from_here | 1 << token, drawn[from_here] * q[token] / (1 - taken[from_here])
            )
    inside = np.where(size == k, drawn, 0)
    for bit in range(len(q)):
        has = everything >> bit & 1 == 1
        inside[has] += inside[everything[has] ^ 1 << bit]
    return inside


def _probabilities(name: str, row) -> np.ndarray:
    row = np.asarray(row, dtype=np.float64)
    if row.ndim != 1 or not len(row) or not (row >= 0).all() or not abs(row.sum() - 1) <= 1e-3:
        raise ValueError(f"{name} must be probabilities [V] that sum to 1, got {row}")
    return row / row.sum()


def expected_tokens(
    tokens: Tensor,
    links: TreeLinks,
    p: Tensor,
    q: Tensor | None = None,
    *,
    mode: str = "traversal",
    kind: Tensor | None = None,
) -> Tensor:
    """Tokens that a round over given trees emits in expectation, over the coins, float64 [B].

    tokens, links, kind: as in `tree_verify`; p, q: probabilities [B, T, V] behind each node, as its
    target and draft with is_prob=True. mode: "target", "multi_round" or "traversal". A round emits
    the accepted tokens and one more. The average over drafts of what they are worth is what a
    drafter is worth. Each step from a node is enumerated, in plain Python.

    Raises ValueError for another mode, and for rows and tokens that cannot be verified.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> links = ops.tree_build(torch.tensor([[-1, 0]], dtype=torch.int32))
        >>> p, q = torch.tensor([[[0.5, 0.5]] * 2]), torch.tensor([[[0.8, 0.2]] * 2])
        >>> tokens = torch.tensor([[0, 0]], dtype=torch.int32)
        >>> ops.expected_tokens(tokens, links, p, q)
        tensor([1.6250], dtype=torch.float64)
    """
    if mode not in MODES[1:4]:
        raise ValueError(f"mode must be one of {', '.join(MODES[1:4])}, got {mode!r}")
    if kind is None:
        usual = DETERMINISTIC if q is None else WITHOUT_REPLACEMENT
        kind = torch.full_like(tokens, usual)
    elif q is None and mode != "target" and bool((kind[links.parents >= 0] != DETERMINISTIC).any()):
        raise ValueError("sampled nodes (kind 0, 1 or 3) need q, that they were drawn from")
    trees = zip(
        *(each.tolist() for each in (tokens, kind, links.first_child, links.next_sibling)),
        strict=True,
    )
    found = []
    for row, tree in enumerate(trees):
        walk = _EveryWay(tree, p[row], None if q is None else q[row])
        try:
            found.append(getattr(walk, f"by_{mode}")(0))
        except BrokenRow as broken:
            reason = next(words for bit, words in BROKEN.items() if broken.args[0] & bit)
            raise ValueError(f"tree {row} cannot be verified: {reason}") from None
    return torch.tensor(found, dtype=torch.float64)


class _EveryWay(Walk):
    """A walk that takes every way, and counts what each emits from a node on."""

    def __init__(self, tree, p: Tensor, q: Tensor | None):
        super().__init__(tree, p, q, None, None, True, 0.0, 0.0)

    def by_target(self, node: int) -> float:
        p, emitted, seen = self._p(node), 1.0, set()
        for child, token in self.children(node):
            if token not in seen:  # of equal siblings the first is taken
                seen.add(token)
                emitted += p[token] * self.by_target(child)
        return emitted

    def by_multi_round(self, node: int) -> float:
        left, emitted, share = self._residual(node), 1.0, 1.0
        for child, token in self.children(node):
            accept = _ratio(left.p[token], left.proposal(token, self.kinds[child]))
            emitted += share * accept * self.by_multi_round(child) if share * accept else 0.0
            share *= 1 - accept
            left.reject(token, self.kinds[child])
        return emitted

    def by_traversal(self, node: int) -> float:
        return self._from(node, 1.0)[1]

    def _from(self, node: int, accept: float) -> tuple[float, float]:
        """The probability that a path through the node is accepted, times what it emits, too."""
        left, emitted, share = self._residual(node), 0.0, 1.0
        for child, token in self.children(node):
            odds = _ratio(accept * left.p[token], left.proposal(token, self.kinds[child]))
            accepted, of_child = self._from(child, odds)
            emitted += share * (accepted + of_child)
            share *= 1 - accepted
            accept = left.reject(token, self.kinds[child], accept)
        if node == 0:
            accept = 1.0
        return 1 - share * (1 - accept), emitted + share * accept


def _ratio(p: float, q: float) -> float:
    return min(1.0, float(p / q)) if q > 0 else float(p > 0)
