"""Modules, and the stateless functions that several domains share."""

from .fsq import FSQ, FiniteCodes, ResidualFSQ
from .kmeans import kmeans
from .lfq import LFQ, LookupFree
from .rvq import GroupedResidualVQ, Quantized, ResidualVQ

__all__ = [
    "FSQ",
    "LFQ",
    "FiniteCodes",
    "GroupedResidualVQ",
    "LookupFree",
    "Quantized",
    "ResidualFSQ",
    "ResidualVQ",
    "kmeans",
]
