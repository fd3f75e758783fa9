"""Speculative decoding: drafters, and what they propose."""

from stillhouse.methods.speculative.tree import Drafter, DraftState, DraftTree, batch_trees

__all__ = ["DraftState", "DraftTree", "Drafter", "batch_trees"]
