"""Methods for speech."""

from stillhouse.methods.speech.dm_codec import (
    CodecConfig,
    CodecWeights,
    DiscriminatorConfig,
    MultiTeacherCodecDistiller,
    SpeechCodec,
    align_text,
    codec_discriminators,
    codec_losses,
    dm_codec_loss,
    feature_axis_distillation,
)
from stillhouse.methods.speech.mel import log_mel
from stillhouse.methods.speech.metrics import pesq, phone_purity, pnmi, stoi, wer, wil

__all__ = [
    "CodecConfig",
    "CodecWeights",
    "DiscriminatorConfig",
    "MultiTeacherCodecDistiller",
    "SpeechCodec",
    "align_text",
    "codec_discriminators",
    "codec_losses",
    "dm_codec_loss",
    "feature_axis_distillation",
    "log_mel",
    "pesq",
    "phone_purity",
    "pnmi",
    "stoi",
    "wer",
    "wil",
]
