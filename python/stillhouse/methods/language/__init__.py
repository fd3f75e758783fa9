"""Methods for language models."""

from stillhouse.methods.language.sinkd import (
    SinKDLoss,
    embedded_sinkhorn_kd,
    sample_sinkhorn_kd,
    sinkhorn_kd,
)
from stillhouse.methods.language.taid import TAIDLoss, taid_loss

__all__ = [
    "SinKDLoss",
    "TAIDLoss",
    "embedded_sinkhorn_kd",
    "sample_sinkhorn_kd",
    "sinkhorn_kd",
    "taid_loss",
]
