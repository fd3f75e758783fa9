"""The family of drafters without a model: trees behind contexts, out of tables of a real size.

A call makes `rows` drafts, one behind each of as many contexts, of at most `columns` nodes; the
time is that of one. `search` is ADED's tree search over a tri-gram table, which is
adapted to the context first, as in generation; `beam` the beam search over the same table, `lookup`
the longest n-gram's continuations. Tables hold two million tokens that are as unequally frequent as
words. The floor of a draft is its own tree, made of arrays that are there already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from .divergence import OURS
from .grid import Cell, Provider

NAME = "draft"
SEARCH, BEAM, LOOKUP = "search", "beam", "lookup"
TOKENS, VOCABULARY = 2_000_000, 49152
CONTEXT = 256
PAUSE_SECONDS = 0.0  # no pool of threads is at work here


def grid() -> list[Cell]:
    """A hundred drafts of 64 nodes."""
    return [Cell(NAME, kind, "tree", "int32", 100, 64) for kind in (SEARCH, BEAM, LOOKUP)]


def products(cell: Cell) -> int:
    """Drafts of one call."""
    return cell.rows


@cache
def _text() -> np.ndarray:
    drawn = np.random.default_rng(0).zipf(1.3, size=TOKENS)
    return (drawn % VOCABULARY).astype(np.int32)


@cache
def _table():
    from stillhouse.methods.speculative import TrigramTable

    table = TrigramTable()
    table.add(_text())
    return table


def _drafter(cell: Cell):
    """One whose trees have up to as many nodes as the cell asks for."""
    from stillhouse.methods.speculative import BeamDrafter, MCTSDrafter, NGramDrafter

    if cell.kind == SEARCH:
        return MCTSDrafter(_table(), keep=cell.columns, max_nodes=cell.columns)
    if cell.kind == BEAM:
        return BeamDrafter(_table(), max_nodes=cell.columns)
    drafter = NGramDrafter(branches=8, max_nodes=cell.columns, capacity=TOKENS)
    drafter.add(_text())
    return drafter


def _states(cell: Cell) -> list:
    from stillhouse.methods.speculative import DraftState

    starts = np.random.default_rng(1).integers(0, TOKENS - CONTEXT, cell.rows)
    ids = torch.from_numpy(_text()).long()
    return [DraftState(ids[start : start + CONTEXT].clone()) for start in starts.tolist()]


def build_ours(cell: Cell) -> Callable[[], None]:
    """`draft` of each state, in Python and with the checks of its tree."""
    drafter, states = _drafter(cell), _states(cell)
    return lambda: [drafter.draft(state) for state in states]


def build_floor(cell: Cell) -> Callable[[], None]:
    """`DraftTree` of the drafts, made before."""
    from stillhouse.methods.speculative import DraftTree

    drafter = _drafter(cell)
    trees = [drafter.draft(state) for state in _states(cell)]
    return lambda: [DraftTree.of(tree.tokens, tree.parents, scores=tree.scores) for tree in trees]


PROVIDERS = (Provider(OURS, build_ours),)
