"""Speculative decoding: drafters, what they propose, and how they learn."""

from stillhouse.methods.speculative.distillspec import (
    DistillSpecLoss,
    acceptance_rate,
    block_efficiency,
    lenient_chain,
    lenient_law,
    speed_up,
    tvd_plus_plus,
)
from stillhouse.methods.speculative.tree import Drafter, DraftState, DraftTree, batch_trees

__all__ = [
    "DistillSpecLoss",
    "DraftState",
    "DraftTree",
    "Drafter",
    "acceptance_rate",
    "batch_trees",
    "block_efficiency",
    "lenient_chain",
    "lenient_law",
    "speed_up",
    "tvd_plus_plus",
]
