"""Methods for language models."""

from stillhouse.methods.language.capacity_gap import (
    CapacityGapLoss,
    capacity_gap_sweep,
    component_sparsity,
    fit_capacity_gap_law,
    mask_importance,
    optimal_teacher,
)
from stillhouse.methods.language.sinkd import (
    SinKDLoss,
    embedded_sinkhorn_kd,
    sample_sinkhorn_kd,
    sinkhorn_kd,
)
from stillhouse.methods.language.taid import TAIDLoss, taid_loss

__all__ = [
    "CapacityGapLoss",
    "SinKDLoss",
    "TAIDLoss",
    "capacity_gap_sweep",
    "component_sparsity",
    "embedded_sinkhorn_kd",
    "fit_capacity_gap_law",
    "mask_importance",
    "optimal_teacher",
    "sample_sinkhorn_kd",
    "sinkhorn_kd",
    "taid_loss",
]
