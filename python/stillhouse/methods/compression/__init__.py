"""Methods for smaller models."""

from stillhouse.methods.compression.db_llm import (
    EntropyWeightedLoss,
    entropy_weighted_kd,
    freeze_fdb_,
    load_fdb,
    quantize_fdb_,
    save_fdb,
)

__all__ = [
    "EntropyWeightedLoss",
    "entropy_weighted_kd",
    "freeze_fdb_",
    "load_fdb",
    "quantize_fdb_",
    "save_fdb",
]
