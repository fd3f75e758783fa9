"""Methods for language models."""

from stillhouse.methods.language.first import FIRSTLoss, fit_temperature, recalibrate
from stillhouse.methods.language.sinkd import (
    SinKDLoss,
    embedded_sinkhorn_kd,
    sample_sinkhorn_kd,
    sinkhorn_kd,
)
from stillhouse.methods.language.taid import TAIDLoss, taid_loss

__all__ = [
    "FIRSTLoss",
    "SinKDLoss",
    "TAIDLoss",
    "embedded_sinkhorn_kd",
    "fit_temperature",
    "recalibrate",
    "sample_sinkhorn_kd",
    "sinkhorn_kd",
    "taid_loss",
]
