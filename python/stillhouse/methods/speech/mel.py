"""Log-mel spectra, differentiable: what codecs and converters are measured by."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

FLOOR = 1e-5


def log_mel(
    wave: Tensor,
    sample_rate: int,
    *,
    n_fft: int,
    hop: int,
    n_mels: int,
    f_min: float = 0.0,
    f_max: float | None = None,
    scale: str = "htk",
    norm: str | None = None,
) -> Tensor:
    """Natural logarithms of the magnitudes in mel bands, [B, S // hop, n_mels].

    wave: [B, S] at sample_rate Hz, float32 or float64 (halves become float32). Hann windows of
    n_fft samples, periodic, one every hop; frame t is centred on samples t hop to (t + 1) hop, for
    which the ends are reflected. Bands from f_min to f_max Hz (half the sample rate where None),
    triangles on the scale "htk" or "slaney", with norm "slaney" of equal area; a band narrower
    than two bins of the FFT may hold none and is constant. Magnitudes below 1e-5 count as 1e-5, so
    silence has no gradient.
    Raises ValueError for another shape or word, a wave too short to be reflected, a hop larger
    than the window and bands beyond half the sample rate.

    Defaults: HTK's scale without a norm (torchaudio's). HiFi-GAN's and its successors' spectra, the
    codecs' among them, are scale "slaney" or "htk" with norm "slaney".

    Example:
        >>> import torch
        >>> from stillhouse.methods.speech import log_mel
        >>> wave = torch.sin(torch.arange(16000) * (2 * torch.pi * 440 / 16000))[None]
        >>> log_mel(wave, 16000, n_fft=1024, hop=320, n_mels=80).argmax(-1)[0, 25]
        tensor(15)
    """
    if wave.dim() != 2:
        raise ValueError(f"wave must be [B, S], got {tuple(wave.shape)}")
    if not 1 <= hop <= n_fft:
        raise ValueError(f"expected 1 <= hop <= n_fft, got {hop} and {n_fft}")
    left = (n_fft - hop) // 2
    right = n_fft - hop - left
    if wave.shape[1] <= max(left, right, hop - 1):
        raise ValueError(
            f"{wave.shape[1]} samples are too few for windows of {n_fft} every {hop}: at least "
            f"{max(right, hop - 1) + 1} are needed"
        )
    filters = mel_filters(sample_rate, n_fft, n_mels, f_min, f_max, scale, norm)
    wave = wave.to(torch.promote_types(wave.dtype, torch.float32))
    # [B, 1, S]: torch reflects the last axis of three.
    wave = pad(wave[:, None], (left, right), "reflect")[:, 0]
    window = torch.hann_window(n_fft, dtype=wave.dtype, device=wave.device)
    spectrum = torch.stft(wave, n_fft, hop, window=window, center=False, return_complex=True)
    mel = spectrum.abs().mT @ filters.to(wave)
    return mel.clamp(min=FLOOR).log()


@functools.lru_cache(maxsize=32)
def mel_filters(
    sample_rate: int,
    n_fft: int,
    n_mels: int,
    f_min: float = 0.0,
    f_max: float | None = None,
    scale: str = "htk",
    norm: str | None = None,
) -> Tensor:
    """The triangles, float64 [n_fft // 2 + 1, n_mels]; arguments and errors as in `log_mel`."""
    f_max = sample_rate / 2 if f_max is None else f_max
    if scale not in ("htk", "slaney") or norm not in (None, "slaney"):
        raise ValueError(
            f"scale must be 'htk' or 'slaney' and norm None or 'slaney', got {scale!r} and {norm!r}"
        )
    if not 0 <= f_min < f_max <= sample_rate / 2 or n_mels < 1:
        raise ValueError(
            f"expected 0 <= f_min < f_max <= {sample_rate / 2:g} and n_mels >= 1, got {f_min:g}, "
            f"{f_max:g} and {n_mels}"
        )
    to_mel, to_hertz = (_htk, _htk_hertz) if scale == "htk" else (_slaney, _slaney_hertz)
    low, high = (to_mel(f) for f in (f_min, f_max))
    points = torch.linspace(low, high, n_mels + 2, dtype=torch.float64)
    corner = to_hertz(points)  # [n_mels + 2]
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    slopes = corner - bins[:, None]  # [bins, n_mels + 2]
    width = corner.diff()
    rising, falling = -slopes[:, :-2] / width[:-1], slopes[:, 2:] / width[1:]
    filters = rising.minimum(falling).clamp(min=0)
    return filters * 2 / (corner[2:] - corner[:-2]) if norm == "slaney" else filters


def _htk(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


def _htk_hertz(mel: Tensor) -> Tensor:
    return 700 * (10 ** (mel / 2595) - 1)


# Slaney's scale: linear to 1 kHz, which is 15, and 27 steps for a factor of 6.4 from there.
def _slaney(hertz: float) -> float:
    return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def _slaney_hertz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, 200 * mel / 3, 1000 * 6.4 ** ((mel - 15) / 27))
