"""Modules, and the stateless functions that several domains share."""

from .adversarial import GradientReversal, discriminator_loss, generator_loss
from .fdb import FDBLinear, FDBWeight
from .fsq import FSQ, FiniteCodes, ResidualFSQ
from .kmeans import kmeans
from .lfq import LFQ, LookupFree
from .rvq import GroupedResidualVQ, Quantized, ResidualVQ

__all__ = [
    "FSQ",
    "LFQ",
    "FDBLinear",
    "FDBWeight",
    "FiniteCodes",
    "GradientReversal",
    "GroupedResidualVQ",
    "LookupFree",
    "Quantized",
    "ResidualFSQ",
    "ResidualVQ",
    "discriminator_loss",
    "generator_loss",
    "kmeans",
]
