"""Modules, and the stateless functions that several domains share."""

from stillhouse.nn.kmeans import kmeans
from stillhouse.nn.rvq import GroupedResidualVQ, Quantized, ResidualVQ

__all__ = ["GroupedResidualVQ", "Quantized", "ResidualVQ", "kmeans"]
