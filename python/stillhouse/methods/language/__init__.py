"""Methods for language models."""

from stillhouse.methods.language.mgsr import (
    DACKL,
    MGSRLoss,
    clipped_kl,
    phrase_spans,
    revise,
    span_correlation,
)
from stillhouse.methods.language.sinkd import (
    SinKDLoss,
    embedded_sinkhorn_kd,
    sample_sinkhorn_kd,
    sinkhorn_kd,
)
from stillhouse.methods.language.taid import TAIDLoss, taid_loss
from stillhouse.methods.language.teacher_hacking import HackingStudy, Trace, detect, sequence_kl

__all__ = [
    "DACKL",
    "HackingStudy",
    "MGSRLoss",
    "SinKDLoss",
    "TAIDLoss",
    "Trace",
    "clipped_kl",
    "detect",
    "embedded_sinkhorn_kd",
    "phrase_spans",
    "revise",
    "sample_sinkhorn_kd",
    "sequence_kl",
    "sinkhorn_kd",
    "span_correlation",
    "taid_loss",
]
