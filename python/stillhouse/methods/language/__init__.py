"""Methods for language models."""

from stillhouse.methods.language.sinkd import (
    SinKDLoss,
    embedded_sinkhorn_kd,
    sample_sinkhorn_kd,
    sinkhorn_kd,
)
from stillhouse.methods.language.taid import TAIDLoss, taid_loss
from stillhouse.methods.language.teacher_hacking import HackingStudy, Trace, detect, sequence_kl

__all__ = [
    "HackingStudy",
    "SinKDLoss",
    "TAIDLoss",
    "Trace",
    "detect",
    "embedded_sinkhorn_kd",
    "sample_sinkhorn_kd",
    "sequence_kl",
    "sinkhorn_kd",
    "taid_loss",
]
