"""Modules, and the stateless functions that several domains share."""

from .fsq import FSQ, Quantized, ResidualFSQ
from .lfq import LFQ, LookupFree

__all__ = ["FSQ", "LFQ", "LookupFree", "Quantized", "ResidualFSQ"]
