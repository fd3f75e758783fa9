"""How many nodes of a draft to verify: those whose chance is worth the time that they take.

A round with the nodes S yields 1 + sum of P(node is accepted) over S tokens on average, in the time
of a forward over |S| + 1 rows. Both sides are measured: forwards by the clock, chances by what
became of earlier nodes of the same kind. The set with the most tokens a second is verified.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from stillhouse.methods.speculative.tree import DETERMINISTIC, DraftTree

SIZES = (1, 2, 4, 8, 16, 32, 64)  # rows whose forwards are measured
DECAY = 0.9  # of a count when the next one comes: what text repeats changes
NEVER_CUT = 0.05  # share of a forward's time: drafts that take less are made in full


class Costs:
    """Seconds of a forward over 1, 2, 3, … rows: measured once, then corrected by each round."""

    _known: ClassVar[WeakKeyDictionary] = WeakKeyDictionary()

    def __init__(self, seconds: dict[int, float]):
        self.seconds = dict(sorted(seconds.items()))
        self.sizes = list(self.seconds)

    @classmethod
    def of(cls, model: nn.Module, rows: int, measure: Callable[[int], float], most: int) -> Costs:
        """Of a model, as it is now, and a batch of `rows`; `measure(size)` runs once for each size
        up to the first at or above `most`, unless that has been done before."""
        parameter = next(model.parameters())
        place = rows, parameter.dtype, parameter.device
        table = cls._known.setdefault(model, {})
        sizes = SIZES[: bisect.bisect_left(SIZES, most) + 1]
        known = table.get(place)
        if known is None or known.sizes[-1] < sizes[-1]:
            table[place] = known = cls({size: measure(size) for size in sizes})
        return known

    def __call__(self, size: int) -> float:
        """Between measured sizes by a straight line, and on along the last one."""
        known = self.seconds.get(size)
        if known is not None or len(self.sizes) == 1:
            return self.seconds[self.sizes[0]] if known is None else known
        upper = min(max(1, bisect.bisect_left(self.sizes, size)), len(self.sizes) - 1)
        low, high = self.sizes[upper - 1], self.sizes[upper]
        slope = (self.seconds[high] - self.seconds[low]) / (high - low)
        return self.seconds[low] + slope * (size - low)

    def update(self, size: int, seconds: float) -> None:
        """Told how long a forward took. One that was disturbed does not count for much."""
        if size in self.seconds:
            known = self.seconds[size]
            self.seconds[size] += 0.1 * (min(seconds, 2 * known) - known)


class Budget:
    """What one sequence's drafts have been worth, and what to verify of the next.

    The chance of a node is the product, along its path, of the chances that a node of its kind
    (first child or later, behind the root or deeper, of such a score) is right where its parent is.
    Every draft counts, whether its nodes were verified or not: which of them were right is seen in
    the tokens that were committed.
    """

    def __init__(self, costs: Costs, most: int):
        self.costs, self.most = costs, most
        self.counts: dict[tuple[int, ...], list[float]] = {}
        self.steps = [0.0, 0.0]  # of sampled drafts: accepted, tried
        self.draft_seconds = [0.0, 0.0]  # and nodes that took them

    def room(self) -> int:
        """The most nodes to ask for: all, unless drafting itself takes time."""
        seconds, nodes = self.draft_seconds
        if not nodes:
            return min(4, self.most)
        node = seconds / nodes
        if node * self.most < NEVER_CUT * self.costs(1):
            return self.most
        chance = (self.steps[0] + 0.7) / (self.steps[1] + 1)
        expected = rate = 0.0
        best = 0
        for size in range(self.most + 1):
            expected += chance**size
            now = expected / (self.costs(size + 1) + size * node)
            if now > rate:
                rate, best = now, size
        if best == 0:  # what was known is forgotten bit by bit: or nothing were ever tried again
            self.steps = [DECAY * each for each in self.steps]
        return best

    def choose(self, tree: DraftTree, depth: int) -> DraftTree:
        """The part of a draft that is worth its time and no deeper than `depth`.

        Raises ValueError for a sampled draft of more than `most` nodes, which cannot be cut.
        """
        depths = depths_of(tree)
        if _sampled(tree):
            return _cut_sampled(tree, depths, depth, self.most)
        chances = self.chances(tree)
        nodes = [node for node in range(1, len(tree)) if depths[node] <= depth]
        nodes.sort(key=lambda node: -chances[node])  # stable: parents stay before their children
        expected, best, rate = 1.0, 0, 1 / self.costs(1)
        for count, node in enumerate(nodes[: self.most], 1):
            expected += chances[node]
            now = expected / self.costs(count + 1)
            if now > rate:
                best, rate = count, now
        return take(tree, [0, *sorted(nodes[:best])])

    def chances(self, tree: DraftTree) -> list[float]:
        """P(node is accepted) of each node; the root's is 1."""
        chances = [1.0]
        for node, key in enumerate(_kinds(tree)[1:], 1):
            right, tried = self.counts.get(key, (0.0, 0.0))
            chance = (right + 0.5 / (1 + key[0])) / (tried + 1)
            chances.append(chances[tree.parents[node]] * chance)
        return chances

    def observe(self, tree: DraftTree, verified: DraftTree, committed: Sequence[int]) -> None:
        """Told what a round drafted, what of it was verified, and which tokens it committed."""
        tokens, parents, keys = tree.tokens.tolist(), tree.parents.tolist(), _kinds(tree)
        children: dict[int, list[int]] = {}
        for node in range(1, len(tokens)):
            children.setdefault(parents[node], []).append(node)
        node = 0
        for token in committed:
            following = None
            for child in children.get(node, ()):
                right = tokens[child] == token
                count = self.counts.setdefault(keys[child], [0.0, 0.0])
                count[0], count[1] = DECAY * count[0] + right, DECAY * count[1] + 1
                following = child if right and following is None else following
            if following is None:
                break
            node = following
        if len(verified) > 1:
            accepted = len(committed) - 1
            failed = accepted < max(depths_of(verified))
            steps = self.steps
            self.steps = [DECAY * steps[0] + accepted, DECAY * steps[1] + accepted + failed]

    def drafted(self, seconds: float, nodes: int) -> None:
        """Told how long a draft took."""
        if nodes:
            known = self.draft_seconds
            self.draft_seconds = [DECAY * known[0] + seconds, DECAY * known[1] + nodes]


class FixedBudget:
    """All nodes of a draft, up to a number and a depth."""

    def __init__(self, most: int):
        self.most = most

    def room(self) -> int:
        return self.most

    def choose(self, tree: DraftTree, depth: int) -> DraftTree:
        """Parents come before their children, so that the first nodes are a tree."""
        depths = depths_of(tree)
        if _sampled(tree):
            return _cut_sampled(tree, depths, depth, self.most)
        kept = [node for node in range(len(tree)) if depths[node] <= depth]
        return take(tree, kept[: self.most + 1])

    def observe(self, tree: DraftTree, verified: DraftTree, committed: Sequence[int]) -> None:
        pass

    def drafted(self, seconds: float, nodes: int) -> None:
        pass


def take(tree: DraftTree, nodes: Sequence[int]) -> DraftTree:
    """The tree of these nodes, in order and with each node's parent among them."""
    if len(nodes) == len(tree):
        return tree
    place = {node: number for number, node in enumerate(nodes)}
    parents = tree.parents.tolist()
    kept = torch.tensor(nodes)
    return DraftTree(
        tree.tokens[kept],
        torch.tensor([place.get(parents[node], -1) for node in nodes], dtype=torch.int32),
        tree.kind[kept],
        None if tree.log_probs is None else tree.log_probs[kept.to(tree.log_probs.device)],
        None if tree.scores is None else tree.scores[kept],
    )


def _kinds(tree: DraftTree) -> list[tuple[int, ...]]:
    """What nodes are counted by: place among their siblings, behind the root or not, score."""
    scores = None if tree.scores is None else tree.scores.tolist()
    siblings: dict[int, int] = {}
    kinds: list[tuple[int, ...]] = []
    for node, parent in enumerate(tree.parents.tolist()):
        place = siblings.get(parent, 0)
        siblings[parent] = place + 1
        size = 0
        if scores is not None and scores[node] > 0 and math.isfinite(scores[node]):
            size = math.frexp(scores[node])[1]
        kinds.append((min(place, 4), int(parent == 0), size))
    return kinds


def _sampled(tree: DraftTree) -> bool:
    return any(kind != DETERMINISTIC for kind in tree.kind.tolist()[1:])


def _cut_sampled(tree: DraftTree, depths: list[int], depth: int, most: int) -> DraftTree:
    """By depth alone: to leave out nodes for what they are would change the law of the others."""
    if len(tree) - 1 > most:
        raise ValueError(
            f"expected a draft of at most {most} sampled nodes, got {len(tree) - 1}: a drafter "
            "must heed DraftState.room, or max_nodes be larger"
        )
    return take(tree, [node for node in range(len(tree)) if depths[node] <= depth])


def depths_of(tree: DraftTree) -> list[int]:
    """Of each node; the root's is 0."""
    depths = [0] * len(tree)
    for node, parent in enumerate(tree.parents.tolist()[1:], 1):
        depths[node] = depths[parent] + 1
    return depths
