"""Speculative decoding: drafters, what they propose, and the loop that verifies it."""

from stillhouse.methods.speculative.generate import generate
from stillhouse.methods.speculative.language_model import LanguageModelDrafter
from stillhouse.methods.speculative.statistics import GenerationStats
from stillhouse.methods.speculative.tree import Drafter, DraftState, DraftTree, batch_trees

__all__ = [
    "DraftState",
    "DraftTree",
    "Drafter",
    "GenerationStats",
    "LanguageModelDrafter",
    "batch_trees",
    "generate",
]
