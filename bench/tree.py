"""The family of draft trees: which path the target accepts, and the token behind it.

Logits are as uneven as a language model's (normal, deviation 5), drafts the same with noise of
deviation 1. `tree`: one random binary tree of 64 nodes, `chain`: one of 8 whose draft is the
target, all accepted; `batch`: 16 trees of 64 nodes. Trees of `greedy` and `target` have the two
most probable tokens, those of `multi_round` and `traversal` are drawn without replacement. Each
call has another position, hence other coins. Rows of one tree may lie in a cache; those of a batch
are copied so often that what is visited does not; a measurement is several calls, so that Python's
own code does. The floor is one read, torch's maximum, of as many rows as the
walk visits. `EAGLE loop` is what drafting code does in torch and Python, a row at a time; in
`greedy` it takes the argmax of all rows at once, as EAGLE does.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .divergence import OURS
from .grid import Cell, Provider

NAME = "tree"
TREE, CHAIN, BATCH = "tree", "chain", "batch"
GREEDY, TARGET, MULTI_ROUND, TRAVERSAL = "greedy", "target", "multi_round", "traversal"
MODES = (GREEDY, TARGET, MULTI_ROUND, TRAVERSAL)
NODES = {TREE: 64, CHAIN: 8, BATCH: 64}
POSITIONS = 64  # of calls, which then begin again
COPIES = {GREEDY: 16, TARGET: 16, MULTI_ROUND: 8, TRAVERSAL: 4}  # of a batch's rows
CALLS = {TREE: 20, CHAIN: 20, BATCH: 8}  # in a measurement
PAUSE_SECONDS = 0.0  # all providers run on torch's own pool


def grid() -> list[Cell]:
    """Modes, by trees and vocabularies; rows are the target's, of all trees."""
    shapes = [(TREE, 64, 32768), (TREE, 64, 131072), (CHAIN, 8, 32768), (BATCH, 1024, 32768)]
    return [Cell(NAME, mode, form, "fp32", *size) for form, *size in shapes for mode in MODES]


def products(cell: Cell) -> int:
    """Calls of one measurement."""
    return CALLS[cell.form]


@dataclass(frozen=True)
class Problem:
    """Trees with their rows, in as many copies as keep them out of caches."""

    tokens: Tensor
    parents: list[list[int]]
    children: list[list[list[int]]]  # of each tree and node
    links: object
    targets: list[Tensor]
    drafts: list[Tensor | None]
    seed: Tensor
    positions: list[Tensor]  # of calls


def _parents(size: int, chain: bool, draw: random.Random) -> list[int]:
    parents, room = [-1], [0]
    for node in range(1, size):
        parent = node - 1 if chain else draw.choice(room)
        parents.append(parent)
        room.append(node)
        if parents.count(parent) == 2:
            room.remove(parent)
    return parents


@cache
def _problem(cell: Cell) -> Problem:
    from stillhouse import ops

    draw = random.Random(0)
    generator = torch.Generator("cpu").manual_seed(0)
    size, columns, chain = NODES[cell.form], cell.columns, cell.form == CHAIN
    trees, sampled = cell.rows // size, cell.kind in (MULTI_ROUND, TRAVERSAL)
    target = 5 * torch.randn(trees, size, columns, generator=generator, device="cpu")
    draft = target.clone()
    if chain and cell.kind == TARGET:
        target.scatter_add_(2, draft.argmax(2, keepdim=True), torch.full((trees, size, 1), 60.0))
    if not chain:
        draft += torch.randn(draft.shape, generator=generator, device="cpu")
    proposed = draft.flatten(0, 1)
    if sampled:
        drawn = torch.multinomial(proposed.softmax(-1), 2, generator=generator)
    else:
        drawn = proposed.topk(2).indices
    drawn = drawn.view(trees, size, 2).tolist()
    parents = [_parents(size, chain, draw) for _ in range(trees)]
    children = [[[] for _ in range(size)] for _ in range(trees)]
    tokens = torch.zeros(trees, size, dtype=torch.int32, device="cpu")
    for tree, of_tree in enumerate(parents):
        for node, parent in enumerate(of_tree[1:], 1):
            siblings = children[tree][parent]
            tokens[tree, node] = drawn[tree][parent][len(siblings)]
            siblings.append(node)
    device = torch.get_default_device()
    links = ops.tree_build(torch.tensor(parents, dtype=torch.int32, device="cpu"))
    copies = COPIES[cell.kind] if cell.form == BATCH else 1
    return Problem(
        tokens.to(device),
        parents,
        children,
        ops.TreeLinks(*(each.to(device) for each in links)),
        [target.to(device, copy=True) for _ in range(copies)],
        [draft.to(device, copy=True) if sampled else None for _ in range(copies)],
        torch.arange(trees, device=device),
        [torch.full((trees,), number, device=device) for number in range(POSITIONS)],
    )


def _turns(cell: Cell, call: Callable[..., object]) -> Callable[[], None]:
    """Calls with the next copy of the rows, and the next position."""
    problem, times = _problem(cell), products(cell)
    rows = itertools.cycle(zip(problem.targets, problem.drafts, strict=True))
    positions = itertools.cycle(problem.positions)

    def run() -> None:
        for _ in range(times):
            call(*next(rows), next(positions))

    return run


def _verify(cell: Cell) -> Callable[..., object]:
    from stillhouse import ops

    problem = _problem(cell)
    return lambda target, draft, position: ops.tree_verify(
        problem.tokens,
        problem.links,
        target,
        draft,
        mode=cell.kind,
        seed=problem.seed,
        position=position,
    )


def build_ours(cell: Cell) -> Callable[[], None]:
    """`ops.tree_verify`."""
    return _turns(cell, _verify(cell))


def build_softmax(cell: Cell) -> Callable[[], None]:
    """The target's probabilities behind all nodes, into memory that is there already."""
    out = torch.empty_like(_problem(cell).targets[0])
    return _turns(cell, lambda target, draft, position: torch.softmax(target, -1, out=out))


# ---- the loop ----


@dataclass
class _Walk:
    """Of one tree, in torch."""

    children: list[list[int]]
    tokens: list[int]
    target: Tensor
    draft: Tensor | None
    coin: Callable[[int], float] = lambda node: random.random()
    rows: int = 0  # that were read

    def law(self, rows: Tensor, node: int) -> Tensor:
        self.rows += 1
        return rows[node].softmax(-1)

    def greedy(self) -> tuple[list[int], int]:
        best, node, path = self.target.argmax(-1).tolist(), 0, [0]
        while node is not None:
            here = self.children[node]
            node = next((c for c in here if self.tokens[c] == best[path[-1]]), None)
            path += [] if node is None else [node]
        return path, best[path[-1]]

    def top_down(self) -> tuple[list[int], int]:
        path = [0]
        while True:
            here = self.children[path[-1]]
            p = self.law(self.target, path[-1])
            q = self.law(self.draft, path[-1]) if self.draft is not None and here else None
            for child in here:
                x = self.tokens[child]
                if self.coin(child) * (1 if q is None else float(q[x])) < float(p[x]):
                    path.append(child)
                    break
                p, q = _rejected(p, q, x)
            else:
                return path, int(torch.multinomial(p, 1))

    def bottom_up(self, node=0, accept=1.0, path=(0,)) -> tuple[list[int], int] | None:
        p = q = None
        if self.children[node] and accept > 0:
            p, q = self.law(self.target, node), self.law(self.draft, node)
        for child in self.children[node]:
            if accept == 0:
                return None
            x = self.tokens[child]
            of_child = min(1.0, accept * float(p[x]) / float(q[x]))
            found = self.bottom_up(child, of_child, (*path, child))
            if found is not None:
                return found
            rest = (accept * p - q).relu_()
            mass = float(rest.sum())
            p = rest / mass if mass > 1e-7 else p
            accept = mass / (mass + 1 - accept) if mass + 1 - accept > 0 else 1.0
            q[x] = 0
            q = q / q.sum()
        if node > 0 and not self.coin(node) < accept:
            return None
        if p is None:
            p = self.law(self.target, node)
        return list(path), int(torch.multinomial(p, 1))


def _rejected(p: Tensor, q: Tensor | None, x: int) -> tuple[Tensor, Tensor | None]:
    """What target and proposal have left: one-hot, or drawn without replacement."""
    if q is None:
        p[x] = 0
        return p / p.sum(), None
    p = (p - q).relu_()
    q[x] = 0
    return p / p.sum(), q / q.sum()


_STEPS = {GREEDY: _Walk.greedy, TRAVERSAL: _Walk.bottom_up}


def build_loop(cell: Cell) -> Callable[[], None]:
    """Tree by tree, a torch call for each step."""
    problem, step = _problem(cell), _STEPS.get(cell.kind, _Walk.top_down)
    tokens = problem.tokens.tolist()

    def call(target: Tensor, draft: Tensor | None, position: Tensor) -> None:
        for tree, children in enumerate(problem.children):
            of_tree = None if draft is None else draft[tree]
            step(_Walk(children, tokens[tree], target[tree], of_tree))

    return _turns(cell, call)


# ---- the floor ----


def visited(cell: Cell, tree: int, position: int, path: list[int]) -> int:
    """Rows, of target and draft, that the walk of a tree reads when this path is accepted."""
    from stillhouse.ops.random import ACCEPT, philox_uniform

    problem = _problem(cell)
    children = problem.children[tree]
    if cell.kind in (GREEDY, TARGET):
        return len(path)
    if cell.kind == MULTI_ROUND:
        return len(path) + sum(bool(children[node]) for node in path)
    # Which rejected nodes it has opened depends on all of their numbers.
    seed = int(problem.seed[tree])
    coins = philox_uniform(seed, position, torch.arange(len(children)), ACCEPT).tolist()
    rows = problem.targets[0][tree], problem.drafts[0][tree]
    walk = _Walk(children, problem.tokens[tree].tolist(), *rows, coins.__getitem__)
    walk.bottom_up()
    return walk.rows


def build_floor(cell: Cell) -> Callable[[], None]:
    """A read of as many rows as are visited at each position."""
    problem, verify = _problem(cell), _verify(cell)
    counts = []
    for number, position in enumerate(problem.positions):
        paths = verify(problem.targets[0], problem.drafts[0], position).path.tolist()
        walked = [[node for node in path if node >= 0] for path in paths]
        counts.append(sum(visited(cell, tree, number, path) for tree, path in enumerate(walked)))
    # Rows of their own, so that no walk has just read them.
    rows = [torch.randn(max(counts), cell.columns) for _ in range(len(problem.targets))]
    turn, count = itertools.cycle(rows), itertools.cycle(counts)

    def run() -> None:
        for _ in range(products(cell)):
            next(turn)[: next(count)].max()

    return run


PROVIDERS = (
    Provider(OURS, build_ours),
    Provider("softmax of all rows", build_softmax),
    Provider("EAGLE loop", build_loop),
)
