"""Drop-in torch ops over the compiled kernels."""

from ._library import cpu_level
from .divergence import Stats, divergence, divergence_loss
from .kinds import (
    JSD,
    KINDS,
    TAID,
    TVD,
    CrossEntropy,
    ForwardKL,
    Kind,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    as_kind,
)

__all__ = [
    "JSD",
    "KINDS",
    "TAID",
    "TVD",
    "CrossEntropy",
    "ForwardKL",
    "Kind",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "Stats",
    "as_kind",
    "cpu_level",
    "divergence",
    "divergence_loss",
]
