"""DM-Codec: a speech codec whose codes keep words, by a text and a speech model that it has heard.

A waveform codec (encoder, residual quantizer, decoder) learns to resynthesise; beside that, what
single stages of its quantizer stand for is pulled towards two frozen teachers: a language model on
the clip's transcript and a self-supervised model on the clip. Nothing of the teachers is needed
afterwards, and the bit rate is what it was.

Equation, q_s the code of stage s, W one linear map, S_m the states of teacher m, n frames:

    Q_m = W mean_{s in stages of m} q_s
    L_m = -1/D sum_d log sigmoid(cos(Q_m[1:n, d], S_m[1:n, d]))
    L   = 500 |x - y|_1 + sum_i w_i |mel_i(x) - mel_i(y)|_1 + 10 L_commit + L_adversarial
          + 2 L_features + 120 sum_m lambda_m L_m

Paper: DM-Codec: Distilling Multimodal Representations for Speech Tokenization, EMNLP 2025,
arXiv 2410.15017. Code by its authors: mubtasimahasan/DM-Codec.

Where we leave the released code: its teachers come with an axis too many, so that the cosine is
broadcast over the batch (refused here); "1:8" is stage 1 alone there and the mean of stages, as the
paper has it, here; its later stages send no gradient to the encoder, ours do; its dead codes are
not replaced; it runs the codec twice a step where teachers have different stages, and its tables
move twice; its weights begin as torch draws them, through which a wave hardly reaches the codes at
first, ours so that it keeps its size.
"""

from __future__ import annotations

from stillhouse.methods.speech.codec_config import CodecConfig
from stillhouse.methods.speech.codec_distiller import MultiTeacherCodecDistiller
from stillhouse.methods.speech.codec_losses import CodecWeights, codec_losses
from stillhouse.methods.speech.codec_teachers import dm_codec_loss
from stillhouse.methods.speech.discriminators import DiscriminatorConfig, codec_discriminators
from stillhouse.methods.speech.feature_axis import feature_axis_distillation
from stillhouse.methods.speech.seanet import SpeechCodec
from stillhouse.methods.speech.text_alignment import align_text

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
]
