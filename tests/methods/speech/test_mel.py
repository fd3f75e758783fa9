"""Log-mel spectra: against transformers' filters (which are librosa's) and its spectrogram, in
closed form, and gradients."""

import math

import numpy as np
import pytest
import torch

from stillhouse.methods.speech import log_mel
from stillhouse.methods.speech.mel import mel_filters

DOUBLE = torch.float64
RATE = 16000
SIZES = dict(n_fft=1024, hop=240, n_mels=80)


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", ["htk", "slaney"])
@pytest.mark.parametrize("norm", [None, "slaney"])
@pytest.mark.parametrize(
    ("rate", "n_fft", "n_mels", "f_min", "f_max"),
    [(16000, 1024, 80, 0.0, 8000.0), (22050, 512, 40, 50.0, 7600.0), (16000, 400, 80, 0.0, 8000.0)],
)
def test_the_filters_are_those_of_transformers(rate, n_fft, n_mels, f_min, f_max, scale, norm):
    audio = pytest.importorskip("transformers.audio_utils")
    want = audio.mel_filter_bank(
        n_fft // 2 + 1, n_mels, f_min, f_max, rate, norm=norm, mel_scale=scale
    )
    found = mel_filters(rate, n_fft, n_mels, f_min, f_max, scale, norm)
    np.testing.assert_allclose(found.numpy(), want, rtol=0, atol=1e-12)
    assert found.shape == (n_fft // 2 + 1, n_mels)


def test_the_spectrum_is_that_of_transformers():
    """With the ends reflected by hand, since its own padding is another one."""
    audio = pytest.importorskip("transformers.audio_utils")
    wave = noise(2, 4000)
    found = log_mel(wave, RATE, **SIZES, norm="slaney")
    assert found.shape == (2, 16, 80)
    left = (1024 - 240) // 2
    for row, got in zip(wave.numpy(), found, strict=True):
        want = audio.spectrogram(
            np.pad(row, (left, left), mode="reflect"),
            audio.window_function(1024, "hann"),
            1024,
            240,
            power=1.0,
            center=False,
            mel_filters=mel_filters(RATE, 1024, 80, norm="slaney").numpy(),
            mel_floor=1e-5,
            dtype=np.float64,
        )
        np.testing.assert_allclose(got.T.numpy(), np.log(want), atol=1e-6)


def test_triangles_of_equal_area():
    """Slaney's norm: each integrates to 1, as far as bins of 1 Hz tell; without it the peaks are
    1."""
    equal = mel_filters(RATE, RATE, 40, norm="slaney")
    torch.testing.assert_close(equal.sum(0), torch.ones(40, dtype=DOUBLE), rtol=1e-3, atol=0)
    plain = mel_filters(RATE, RATE, 40)
    assert plain.max() <= 1
    assert plain.amax(0).min() > 0.97
    # Neighbours add up to 1 between the first and the last peak.
    peaks = plain.argmax(0)
    inner = plain[int(peaks[0]) : int(peaks[-1])].sum(1)
    torch.testing.assert_close(inner, torch.ones_like(inner), rtol=0, atol=0.03)


def test_a_tone_is_in_its_band_by_its_loudness():
    """A sine of amplitude A at a bin's frequency is A/2 times the window's sum there."""
    bin_, amplitude = 64, 0.3
    time = torch.arange(8000, dtype=DOUBLE)
    wave = amplitude * torch.sin(2 * math.pi * bin_ / 1024 * time)[None]
    filters = mel_filters(RATE, 1024, 80)
    found = log_mel(wave, RATE, **SIZES)[0, 10:20]
    # Hann's neighbours have half of it.
    want = amplitude / 2 * 512 * (filters[bin_] + filters[[bin_ - 1, bin_ + 1]].sum(0) / 2)
    band = int(want.argmax())
    torch.testing.assert_close(found[:, band].exp(), want[band].expand(10), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        log_mel(2 * wave, RATE, **SIZES)[0, 10:20, band], found[:, band] + math.log(2)
    )


@pytest.mark.parametrize("hop", [240, 241, 320, 1024])
def test_frames_are_the_whole_hops(hop):
    """Also where what is added cannot be halved."""
    for samples in (1500, 1920, 2049):
        found = log_mel(noise(1, samples), RATE, n_fft=1024, hop=hop, n_mels=10)
        assert found.shape[1] == samples // hop


def test_frames_stand_over_their_samples():
    """A click in the middle of frame t is loudest in frame t."""
    for t in (2, 5, 9):
        wave = torch.zeros(1, 3200, dtype=DOUBLE)
        wave[0, 240 * t + 120] = 1.0
        found = log_mel(wave, RATE, **SIZES)
        assert int(found.sum(-1)[0].argmax()) == t


def test_silence_is_the_floor_and_has_no_gradient():
    wave = torch.zeros(1, 2000, requires_grad=True)
    found = log_mel(wave, RATE, **SIZES)
    torch.testing.assert_close(found, torch.full_like(found, math.log(1e-5)))
    found.sum().backward()
    assert wave.grad.abs().max() == 0


def test_bands_without_a_bin_are_constant():
    """80 bands of 65 bins, the smallest of the codec's spectra."""
    filters = mel_filters(RATE, 128, 80, norm="slaney")
    empty = filters.sum(0) == 0
    assert 5 < int(empty.sum()) < 40
    found = log_mel(noise(1, 800), RATE, n_fft=128, hop=30, n_mels=80, norm="slaney")
    assert (found[..., empty] == math.log(1e-5)).all()
    assert (found[..., ~empty] > math.log(1e-5) + 1).all()


def test_gradients():
    wave = noise(2, 90).requires_grad_()
    sizes = dict(n_fft=32, hop=8, n_mels=6)
    assert torch.autograd.gradcheck(lambda x: log_mel(x, RATE, **sizes), wave)


def test_halves_become_float32():
    wave = noise(1, 2000).bfloat16()
    found = log_mel(wave, RATE, **SIZES)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, log_mel(wave.float(), RATE, **SIZES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(wave=torch.zeros(2, 1, 900)), r"wave must be \[B, S\]"),
        (dict(wave=torch.zeros(2, 392)), "392 samples are too few .* at least 393"),
        (dict(hop=0), "expected 1 <= hop <= n_fft"),
        (dict(hop=2048), "expected 1 <= hop <= n_fft"),
        (dict(scale="bark"), "scale must be 'htk' or 'slaney'"),
        (dict(norm="area"), "norm None or 'slaney'"),
        (dict(f_max=9000.0), "f_max <= 8000"),
        (dict(f_min=8000.0), "0 <= f_min < f_max"),
        (dict(n_mels=0), "n_mels >= 1"),
    ],
)
def test_bad_input(changes, message):
    options = dict(wave=torch.zeros(2, 900), sample_rate=RATE, **SIZES) | changes
    with pytest.raises(ValueError, match=message):
        log_mel(**options)
