"""Speculative decoding: drafters, what they propose, and the loop that verifies it."""

from stillhouse.methods.speculative.aded import BeamDrafter, MCTSDrafter, TrigramTable
from stillhouse.methods.speculative.expansion import (
    Level,
    dynamic_tree,
    expand_level,
    static_tree,
)
from stillhouse.methods.speculative.generate import generate
from stillhouse.methods.speculative.language_model import LanguageModelDrafter
from stillhouse.methods.speculative.ngram import NGramDrafter
from stillhouse.methods.speculative.statistics import GenerationStats
from stillhouse.methods.speculative.tree import Drafter, DraftState, DraftTree, batch_trees

__all__ = [
    "BeamDrafter",
    "DraftState",
    "DraftTree",
    "Drafter",
    "GenerationStats",
    "LanguageModelDrafter",
    "Level",
    "MCTSDrafter",
    "NGramDrafter",
    "TrigramTable",
    "batch_trees",
    "dynamic_tree",
    "expand_level",
    "generate",
    "static_tree",
]
