"""Speculative decoding: drafters, and what they propose."""

from stillhouse.methods.speculative.aded import BeamDrafter, MCTSDrafter, TrigramTable
from stillhouse.methods.speculative.expansion import (
    Level,
    dynamic_tree,
    expand_level,
    static_tree,
)
from stillhouse.methods.speculative.ngram import NGramDrafter
from stillhouse.methods.speculative.tree import Drafter, DraftState, DraftTree, batch_trees

__all__ = [
    "BeamDrafter",
    "DraftState",
    "DraftTree",
    "Drafter",
    "Level",
    "MCTSDrafter",
    "NGramDrafter",
    "TrigramTable",
    "batch_trees",
    "dynamic_tree",
    "expand_level",
    "static_tree",
]
