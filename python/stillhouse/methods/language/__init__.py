"""Methods for language models."""

from stillhouse.methods.language.first import FIRSTLoss, fit_temperature, recalibrate
from stillhouse.methods.language.multi_teacher_bert import (
    EnsembleLoss,
    TeacherEnsemble,
    common_tokens,
    ensemble_kl,
    label_loyalty,
    multi_teacher_loss,
    probability_loyalty,
    rare_word_masking,
    regression_loyalty,
    retokenize_embeddings,
)
from stillhouse.methods.language.sinkd import (
    SinKDLoss,
    embedded_sinkhorn_kd,
    sample_sinkhorn_kd,
    sinkhorn_kd,
)
from stillhouse.methods.language.taid import TAIDLoss, taid_loss

__all__ = [
    "EnsembleLoss",
    "FIRSTLoss",
    "SinKDLoss",
    "TAIDLoss",
    "TeacherEnsemble",
    "common_tokens",
    "embedded_sinkhorn_kd",
    "ensemble_kl",
    "fit_temperature",
    "label_loyalty",
    "multi_teacher_loss",
    "probability_loyalty",
    "rare_word_masking",
    "recalibrate",
    "regression_loyalty",
    "retokenize_embeddings",
    "sample_sinkhorn_kd",
    "sinkhorn_kd",
    "taid_loss",
]
