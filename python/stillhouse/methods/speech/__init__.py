"""Methods for speech."""

from stillhouse.methods.speech.discriminators import DiscriminatorConfig, codec_discriminators
from stillhouse.methods.speech.feature_axis import feature_axis_distillation
from stillhouse.methods.speech.mel import log_mel
from stillhouse.methods.speech.text_alignment import align_text

__all__ = [
    "DiscriminatorConfig",
    "align_text",
    "codec_discriminators",
    "feature_axis_distillation",
    "log_mel",
]
