"""Speculative decoding: drafters, how they learn, and the loop that verifies their trees."""

from stillhouse.methods.speculative.aded import BeamDrafter, MCTSDrafter, TrigramTable
from stillhouse.methods.speculative.distillspec import (
    DistillSpecLoss,
    acceptance_rate,
    block_efficiency,
    lenient_chain,
    lenient_law,
    speed_up,
    tvd_plus_plus,
)
from stillhouse.methods.speculative.expansion import (
    Level,
    dynamic_tree,
    expand_level,
    static_tree,
)
from stillhouse.methods.speculative.fspad import (
    DynamicTreeDrafter,
    FSPADHead,
    draft_head_loss,
    target_features,
    train_draft_head,
)
from stillhouse.methods.speculative.generate import generate
from stillhouse.methods.speculative.language_model import LanguageModelDrafter
from stillhouse.methods.speculative.ngram import NGramDrafter
from stillhouse.methods.speculative.statistics import GenerationStats
from stillhouse.methods.speculative.tree import Drafter, DraftState, DraftTree, batch_trees

__all__ = [
    "BeamDrafter",
    "DistillSpecLoss",
    "DraftState",
    "DraftTree",
    "Drafter",
    "DynamicTreeDrafter",
    "FSPADHead",
    "GenerationStats",
    "LanguageModelDrafter",
    "Level",
    "MCTSDrafter",
    "NGramDrafter",
    "TrigramTable",
    "acceptance_rate",
    "batch_trees",
    "block_efficiency",
    "draft_head_loss",
    "dynamic_tree",
    "expand_level",
    "generate",
    "lenient_chain",
    "lenient_law",
    "speed_up",
    "static_tree",
    "target_features",
    "train_draft_head",
    "tvd_plus_plus",
]
