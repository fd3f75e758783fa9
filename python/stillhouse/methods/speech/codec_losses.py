"""What a codec is trained by beside its teachers: waves, spectra, codes and discriminators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from stillhouse.methods.speech.discriminators import Judged
from stillhouse.methods.speech.mel import log_mel
from stillhouse.methods.speech.seanet import CodecOutput
from stillhouse.nn import generator_loss


@dataclass(frozen=True)
class CodecWeights:
    """What each part of `codec_losses` weighs; mel has a weight for each resolution.

    Raises ValueError where one is negative or not finite.

    Defaults: the released trainer's.

    Example:
        >>> from stillhouse.methods.speech import CodecWeights
        >>> CodecWeights(distill=0).time
        500.0
    """

    time: float = 500.0
    mel: tuple[float, ...] = (45.0, 1.0, 1.0, 1.0)
    commit: float = 10.0
    adversarial: float = 1.0
    features: float = 2.0
    distill: float = 120.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mel", tuple(self.mel))
        numbers = *self.mel, *(v for name, v in vars(self).items() if name != "mel")
        if any(not 0 <= number < float("inf") for number in numbers):
            raise ValueError(f"weights must be numbers >= 0, got {self}")


def codec_losses(
    wave: Tensor,
    output: CodecOutput,
    *,
    discriminators: Callable[[Tensor], Judged] | None = None,
    distillation: Tensor | None = None,
    weights: CodecWeights | None = None,
    sample_rate: int = 16000,
    n_fft: int = 1024,
    hop: int = 240,
    n_mels: int = 80,
) -> dict[str, Tensor]:
    """The generator's loss and its parts.

        time         mean |x - y|, wave x and audio y
        mel          sum_i w_i mean |logmel_i(x) - logmel_i(y)|, windows n_fft / 2^i, hops hop / 2^i
        commit       the mean of the stages' commitment losses
        adversarial  sum over discriminators of mean (1 - D(y))^2
        features     sum over their layers of mean |f(x) - f(y)|
        distill      `distillation`, a scalar
        loss         the sum of weight times part, mel's weights being inside

    wave: [B, S], as the codec was given it. discriminators: `codec_discriminators`' or a function
    like it, called once with both; what it makes of the real wave has no gradient. Parts that have
    no argument are left out.
    Raises ValueError for audio of another shape than the wave's, and what `log_mel` raises.

    Defaults: weights and spectra of the released trainer (80 bands, HTK's scale, Slaney's norm). It
    has the L1 distance of spectra alone, where the paper's text adds L2.

    Example:
        >>> import torch
        >>> from stillhouse.methods.speech import CodecConfig, SpeechCodec, codec_losses
        >>> wave = torch.randn(1, 3200)
        >>> parts = codec_losses(wave, SpeechCodec(CodecConfig.small())(wave))
        >>> list(parts)
        ['loss', 'time', 'mel', 'commit']
        >>> parts["loss"].backward()
    """
    weights = CodecWeights() if weights is None else weights
    audio = output.audio
    if audio.shape != wave.shape:
        raise ValueError(f"the wave is {tuple(wave.shape)} and the audio {tuple(audio.shape)}")
    parts = {
        "time": l1_loss(audio, wave),
        "mel": _mel_loss(audio, wave, weights.mel, sample_rate, n_fft, hop, n_mels),
        "commit": output.commit_loss.mean(),
    }
    if discriminators is not None:
        judged = discriminators(torch.cat([wave, audio]))
        parts["adversarial"] = generator_loss([score.chunk(2)[1] for score in judged.scores])
        distances = []
        for layer in (layer for layers in judged.features for layer in layers):
            real, fake = layer.chunk(2)
            distances.append(l1_loss(fake, real.detach()))
        parts["features"] = torch.stack(distances).sum()
    if distillation is not None:
        parts["distill"] = distillation
    weighted = [
        part if name == "mel" else getattr(weights, name) * part for name, part in parts.items()
    ]
    return {"loss": sum(weighted[1:], weighted[0]), **parts}


def _mel_loss(
    audio: Tensor,
    wave: Tensor,
    weights: tuple[float, ...],
    sample_rate: int,
    n_fft: int,
    hop: int,
    n_mels: int,
) -> Tensor:
    total = audio.new_zeros(())
    for number, weight in enumerate(weights):
        if weight:
            sizes = dict(n_fft=n_fft >> number, hop=hop >> number, n_mels=n_mels, norm="slaney")
            # In one call: the windows of both.
            spectra = log_mel(torch.cat([audio, wave]), sample_rate, **sizes)
            total = total + weight * l1_loss(*spectra.chunk(2))
    return total
