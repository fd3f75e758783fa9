"""Methods for smaller models."""

from stillhouse.methods.compression.account import Account, account
from stillhouse.methods.compression.db_llm import (
    EntropyWeightedLoss,
    entropy_weighted_kd,
    freeze_fdb_,
    load_fdb,
    quantize_fdb_,
    save_fdb,
)

__all__ = [
    "Account",
    "EntropyWeightedLoss",
    "account",
    "entropy_weighted_kd",
    "freeze_fdb_",
    "load_fdb",
    "quantize_fdb_",
    "save_fdb",
]
