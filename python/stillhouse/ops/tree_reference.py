"""What the tree kernels compute, request by request, in float64: plain, and hence to be believed.

Devices without a kernel run it. Rows are numpy's, since a walk looks at few numbers at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .random import ACCEPT, FINAL, philox_uniform

MODES = ("greedy", "target", "multi_round", "traversal", "typical")
# How a node was proposed.
WITHOUT_REPLACEMENT, IID, DETERMINISTIC, BEHIND_DETERMINISTIC = range(4)
# Bits of a status.
NOT_FINITE, NOT_NORMALIZED, NO_SUCH_TOKEN, VANISHED = 1, 2, 4, 8
PADDING = -2
MOST_NODES, MOST_DEPTH, MOST_CHILDREN = 1024, 64, 64
LEAST_MASS = 1e-7  # of a residual that can be sampled
LEAST_REST = 1e-30  # of a proposal of which tokens were taken


def build(parents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """first_child, next_sibling, depth, ancestors of trees [B, T], and the first wrong node."""
    batch, size = parents.shape
    shape = 3, batch, size
    first_child, next_sibling, depth = np.full(shape, -1, np.int32)
    ancestors = np.zeros((batch, size, -(-size // 64)), np.uint64)
    bad = np.full(batch, -1, np.int32)
    for row, of_row in enumerate(parents.tolist()):
        last_child, children, ended = [-1] * size, [0] * size, False
        for node, parent in enumerate(of_row):
            ended = ended or (parent == PADDING and node > 0)
            if ended and parent == PADDING:
                continue
            fits = not ended and (parent == -1 if node == 0 else 0 <= parent < node)
            if fits and node > 0:
                children[parent] += 1
                fits = depth[row, parent] < MOST_DEPTH and children[parent] <= MOST_CHILDREN
            if not fits:
                bad[row] = node
                break
            ancestors[row, node, node // 64] = 1 << node % 64
            depth[row, node] = 0
            if node > 0:
                depth[row, node] = depth[row, parent] + 1
                ancestors[row, node] |= ancestors[row, parent]
                before = last_child[parent]
                links, place = (first_child, parent) if before < 0 else (next_sibling, before)
                links[row, place] = last_child[parent] = node
    made = first_child, next_sibling, depth, ancestors.view(np.int64), bad
    return tuple(torch.from_numpy(each).to(parents.device) for each in made)


class BrokenRow(Exception):
    """Something in the inputs that no walk can pass; its argument is the status."""


class Residual:
    """What target and proposal have left at a node while its children are rejected in turn."""

    def __init__(self, p: np.ndarray, q: np.ndarray | None, removed: list[int]):
        """removed: tokens that the proposal was kept from."""
        self.p, self.q = p, q
        self.rest = 1.0  # of q's mass, before it was normalized
        self.vanished = False
        for token in removed:
            self._remove(token)

    def proposal(self, token: int, kind: int) -> float:
        """The probability with which a child's token was proposed."""
        return 1.0 if kind == DETERMINISTIC else float(self.q[token])

    def is_lost(self, kind: int) -> bool:
        """Whether nothing is known of how a child was drawn: then it is passed over."""
        return kind in (WITHOUT_REPLACEMENT, BEHIND_DETERMINISTIC) and self.rest <= LEAST_REST

    def reject(self, token: int, kind: int, accept: float = 1.0) -> float:
        """p becomes norm(relu(accept p - q)); the probability to accept the node itself then."""
        if kind == DETERMINISTIC:
            left = self.p.copy()
            left[token] = 0
        else:
            left = np.maximum(accept * self.p - self.q, 0)
        mass = float(left.sum())
        if mass <= LEAST_MASS:
            self.vanished = True
        else:
            self.p = left / mass
        if kind == DETERMINISTIC:
            mass *= accept
        if kind in (WITHOUT_REPLACEMENT, BEHIND_DETERMINISTIC):
            self._remove(token)
        refused = 1 - accept
        return mass / (mass + refused) if mass + refused > 0 else 1.0

    def _remove(self, token: int) -> None:
        q = self.q.copy()
        q[token] = 0
        mass = q.sum()
        self.rest *= mass
        self.q = q / mass if mass > 0 else q


def probabilities(row: Tensor, temperature: float | None, is_prob: bool) -> np.ndarray:
    """A row in float64; raises BrokenRow."""
    x = row.double().cpu().numpy()
    largest = x.max()  # NaN if there is one
    if not np.isfinite(largest):
        raise BrokenRow(NOT_FINITE)
    if is_prob:
        if x.min() < 0 or abs(x.sum() - 1) > 1e-3:
            raise BrokenRow(NOT_NORMALIZED)
        return x
    if temperature is not None and not 0 < temperature < np.inf:
        raise BrokenRow(NOT_FINITE)
    x = np.exp((x - largest) / (1.0 if temperature is None else temperature))
    return x / x.sum()


def sample(p: np.ndarray, u: float) -> int:
    """The first token whose cumulative sum is above u times the mass."""
    cumulated = p.cumsum()
    token = int(np.searchsorted(cumulated, u * cumulated[-1], side="right"))
    return min(token, int(p.nonzero()[0][-1]))


class Walk:
    """The verification of one request."""

    def __init__(self, tree, target, draft, temperature, coins, is_prob, epsilon, delta):
        """tree: lists of tokens, kinds, first children and next siblings; target, draft: rows."""
        self.tokens, self.kinds, self.first_child, self.next_sibling = tree
        self.target, self.draft, self.coins = target, draft, coins
        self.temperature, self.is_prob = temperature, is_prob
        self.epsilon, self.delta = epsilon, delta
        self.path, self.final = [0], -1
        self.accept_prob, self.status = 1.0, 0

    def run(self, mode: int) -> None:
        try:
            if MODES[mode] == "traversal":
                self._visit(0, 1.0, [0])
                return
            step = getattr(self, "_" + MODES[mode])
            child = step(0)
            while child >= 0:
                self.path.append(child)
                child = step(child)
        except BrokenRow as broken:
            self.status |= broken.args[0]
            self.final = -1

    def children(self, node: int):
        """Nodes and their tokens, in order."""
        child = self.first_child[node]
        while child >= 0:
            token = self.tokens[child]
            if not 0 <= token < self.target.shape[1]:
                raise BrokenRow(NO_SUCH_TOKEN)
            yield child, token
            child = self.next_sibling[child]

    def _p(self, node: int) -> np.ndarray:
        return probabilities(self.target[node], self.temperature, self.is_prob)

    def _residual(self, node: int) -> Residual:
        children = [(token, self.kinds[child]) for child, token in self.children(node)]
        kinds = {kind for _, kind in children}
        q = None
        if kinds - {DETERMINISTIC}:
            q = probabilities(self.draft[node], self.temperature, self.is_prob)
        fixed = [token for token, kind in children if kind == DETERMINISTIC]
        return Residual(self._p(node), q, fixed if BEHIND_DETERMINISTIC in kinds else [])

    def _match(self, node: int) -> int:
        """The first child that has the final token."""
        return next((child for child, token in self.children(node) if token == self.final), -1)

    # A step from an accepted node: the child that is accepted next, or -1 and the final token.

    def _greedy(self, node: int) -> int:
        probabilities(self.target[node], None, self.is_prob)
        # Of the row as it is, since exp may make two of its numbers equal; numpy finds the lowest.
        self.final = int(self.target[node].double().cpu().numpy().argmax())
        return self._match(node)

    def _target(self, node: int) -> int:
        p = self._p(node)
        self.final = sample(p, self.coins[node][FINAL])
        child = self._match(node)
        if child >= 0:
            self.accept_prob = float(p[self.final])
        return child

    def _multi_round(self, node: int) -> int:
        left = self._residual(node)
        for child, token in self.children(node):
            if left.is_lost(self.kinds[child]):
                continue
            p, q = float(left.p[token]), left.proposal(token, self.kinds[child])
            if self.coins[child][ACCEPT] * q < p:
                self.accept_prob = min(1.0, p / q) if q > 0 else 1.0
                return child
            left.reject(token, self.kinds[child])
            self.status |= VANISHED * left.vanished
        self.final = sample(left.p, self.coins[node][FINAL])
        return -1

    def _typical(self, node: int) -> int:
        p = self._p(node)
        some = p[p > 0]
        entropy = -float((some * np.log(some)).sum())
        threshold = min(self.epsilon, self.delta * np.exp(-entropy))
        for child, token in self.children(node):
            if p[token] > threshold:
                return child
        self.final = sample(p, self.coins[node][FINAL])
        return -1

    def _visit(self, node: int, accept: float, path: list[int]) -> bool:
        """Whether a path through the node is accepted, the longest one first."""
        if accept == 0:  # nor can anything below be accepted
            return False
        left = self._residual(node)
        for child, token in self.children(node):
            if left.is_lost(self.kinds[child]):
                continue
            p, q = float(left.p[token]), left.proposal(token, self.kinds[child])
            of_child = min(1.0, accept * p / q) if q > 0 else float(accept * p > 0)
            if self._visit(child, of_child, [*path, child]):
                return True
            accept = left.reject(token, self.kinds[child], accept)
            self.status |= VANISHED * left.vanished
            if accept == 0:
                return False
        if node > 0 and not self.coins[node][ACCEPT] < accept:
            return False
        self.path, self.accept_prob = path, accept if node > 0 else 1.0
        self.final = sample(left.p, self.coins[node][FINAL])
        return True


def verify(
    tokens: Tensor,
    parents: Tensor,
    first_child: Tensor,
    next_sibling: Tensor,
    target: Tensor,
    draft: Tensor | None,
    kind: Tensor | None,
    temperature: Tensor | None,
    seed: Tensor,
    position: Tensor,
    coins: Tensor | None,
    mode: int,
    is_prob: bool,
    epsilon: float,
    delta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """n_accepted, path, out_tokens, accept_prob and status, with the arguments of the op."""
    batch, size = tokens.shape
    width = min(size - 1, MOST_DEPTH) + 1
    if coins is None:
        nodes = torch.arange(size)[:, None]
        key = seed.cpu()[:, None, None], position.cpu()[:, None, None]
        coins = philox_uniform(*key, nodes, torch.tensor([ACCEPT, FINAL]))
    if kind is None:
        usual = DETERMINISTIC if draft is None else WITHOUT_REPLACEMENT
        kind = torch.full_like(tokens, usual)
    trees = zip(*(each.tolist() for each in (tokens, kind, first_child, next_sibling)), strict=True)
    warmth = [None] * batch if temperature is None else temperature.tolist()
    path, out = np.full((2, batch, width), -1, np.int32)
    accepted, status = np.zeros((2, batch), np.int32)
    accept_prob = np.ones(batch, np.float32)
    for row, (tree, of_row) in enumerate(zip(trees, coins.tolist(), strict=True)):
        rows = target[row], None if draft is None else draft[row]
        walk = Walk(tree, *rows, warmth[row], of_row, is_prob, epsilon, delta)
        walk.run(mode)
        end = len(walk.path)
        accepted[row], accept_prob[row], status[row] = end - 1, walk.accept_prob, walk.status
        path[row, :end] = walk.path
        out[row, :end] = [*(tree[0][node] for node in walk.path[1:]), walk.final]
    made = accepted, path, out, accept_prob, status
    return tuple(torch.from_numpy(each).to(tokens.device) for each in made)
