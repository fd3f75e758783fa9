"""Discriminators: sizes of the published ones, the same layers in other packages, what they fold
and window, and that they learn to tell."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stillhouse.methods.speech import DiscriminatorConfig, codec_discriminators
from stillhouse.methods.speech.discriminators import ByPeriod, ByScale, BySpectrum
from stillhouse.nn import discriminator_loss

DOUBLE = torch.float64


def count(module):
    return sum(each.numel() for each in module.parameters())


def test_the_published_sizes():
    """HiFi-GAN's 41.1M and 29.6M, and EnCodec's filters of 32 channels."""
    with torch.device("meta"):
        judges = codec_discriminators()

    def conv(a, b, taps, groups=1, norm=1):
        return a * b * taps // groups + (1 + norm) * b

    period = [
        (1, 32, 5),
        (32, 128, 5),
        (128, 512, 5),
        (512, 1024, 5),
        (1024, 1024, 5),
        (1024, 1, 3),
    ]
    scale = [
        (1, 128, 15), (128, 128, 41, 4), (128, 256, 41, 16), (256, 512, 41, 16),
        (512, 1024, 41, 16), (1024, 1024, 41, 16), (1024, 1024, 5), (1024, 1, 3),
    ]  # fmt: skip
    spectrum = conv(2, 32, 27, norm=0) + 3 * conv(32, 32, 27) + conv(32, 32, 9) + conv(32, 1, 9)
    of = [sum(conv(*each) for each in period)] * 5
    # The spectral norm has no lengths of its own.
    of += [sum(conv(*each, norm=0) for each in scale)] + [sum(conv(*each) for each in scale)] * 2
    of += [spectrum] * 5
    assert [count(each) for each in judges.judges] == of
    assert (round(sum(of[:5]) / 1e5), round(sum(of[5:8]) / 1e5)) == (411, 296)
    assert [each.period for each in judges.judges[:5]] == [2, 3, 5, 7, 11]
    assert [each.window for each in judges.judges[8:]] == [1024, 2048, 512, 256, 128]
    small = codec_discriminators(DiscriminatorConfig.small())
    assert count(small) == 84_262


def test_shapes_of_scores_and_features():
    config = DiscriminatorConfig(share=1 / 8, windows=(256,), filters=4)
    scores, features = codec_discriminators(config)(torch.randn(3, 2000))
    assert len(scores) == len(features) == 9
    assert all(each.shape[0] == 3 and each.dim() == 2 for each in scores)
    assert [len(each) for each in features] == [6] * 5 + [8] * 3 + [5]
    assert features[0][0].shape == (3, 4, 334, 2)  # a third of 1000 rows of two samples
    assert features[5][1].shape == (3, 16, 1000)
    assert features[6][0].shape == (3, 16, 1001)
    assert features[8][1].shape == (3, 4, 28, 65)  # 128 / 2 + 1 of 129 bins
    for score, layers in zip(scores[:8], features[:8], strict=True):
        assert torch.equal(score, layers[-1].flatten(1))


def test_periods_do_not_mix():
    """What is a multiple of the period apart is seen together, what is not is not."""
    judge = ByPeriod(3, 1 / 16).double()
    wave = torch.randn(1, 1, 200, dtype=DOUBLE)
    changed = wave.clone()
    changed[..., 1::3] += 1
    before, after = judge(wave)[1], judge(changed)[1]
    for a, b in zip(before, after, strict=True):
        differs = (a != b).any(1)[0]
        assert differs[:, 1].any()
        # The last sample of column 2 is a reflection of column 0's, sample 198 of 197: none of 1.
        assert not differs[:, [0]].any()


def test_what_is_whole_periods_is_not_padded():
    """Three rows of two samples leave one after a stride of three, four would leave two."""
    judge = ByPeriod(2, 1 / 16)
    assert judge(torch.randn(1, 1, 6))[1][0].shape[2:] == (1, 2)
    assert judge(torch.randn(1, 1, 7))[1][0].shape[2:] == (2, 2)


def test_scales_are_halves():
    judge = ByScale(1, 1 / 8).double()
    wave = torch.randn(1, 1, 256, dtype=DOUBLE)
    padded = nn.functional.pad(wave, (2, 2))
    halved = padded.unfold(-1, 4, 2).mean(-1)
    torch.testing.assert_close(
        judge(wave)[1][0], nn.functional.leaky_relu(judge.layers[0](halved), 0.1)
    )


def test_the_wave_itself_meets_a_bounded_gain():
    """The spectral norm of a layer's matrix is 1 once the power iteration has come to rest."""
    judge = ByScale(0, 1 / 8)
    for _ in range(60):
        judge(torch.randn(1, 1, 600))
    judge.eval()
    for layer in judge.layers:
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert float(norm.detach()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("window", [128, 256])
def test_spectra(window):
    """Windows of length 1: white noise has power 1 in each bin; bins and frames as scipy's."""
    signal = pytest.importorskip("scipy.signal")
    judge = BySpectrum(window, 4)
    noise = torch.randn(1, 1, 200_000, dtype=DOUBLE)
    found = judge.spectrum(noise)
    assert found.shape == (1, 2, (200_000 - window) // (window // 4) + 1, window // 2 + 1)
    power = found.square().sum(1)[0, :, 2:-2].mean()
    assert float(power) == pytest.approx(1, abs=0.02)
    hann = signal.get_window("hann", window)
    hann /= np.sqrt((hann**2).sum())
    frames = noise[0, 0].unfold(0, window, window // 4).numpy()[:50]
    want = torch.from_numpy(np.fft.rfft(frames * hann))
    torch.testing.assert_close(torch.complex(*found[0, :, :50]), want, rtol=1e-9, atol=1e-11)


def peer(name, path, **stubs):
    """A file of an installed package, with stubs for what it imports and does not need here."""
    found = importlib.util.find_spec(name)
    if found is None or importlib.util.find_spec("einops") is None:
        pytest.skip(f"{name} or einops is not installed")
    folder = Path(found.submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location(f"peer_{name}", folder / path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for stub, names in stubs.items():
            patch.setitem(sys.modules, stub, types.SimpleNamespace(**names))
        spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_periods_are_those_of_dac():
    """Its layers with our weights; on a wave that is no multiple, for it pads any by a period."""
    stubs = dict(AudioSignal=None, STFTParams=None, ml=types.SimpleNamespace(BaseModel=nn.Module))
    theirs = peer("dac", "model/discriminator.py", audiotools=stubs).MPD(5)
    ours = ByPeriod(5)
    with torch.no_grad():
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.copy_(a.view_as(b))
    wave = torch.randn(2, 1, 803)
    features = theirs(wave)
    for a, b in zip(ours(wave)[1], features, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_spectra_are_those_of_encodec():
    """Its layers with our weights, and torchaudio's spectrogram as it is documented."""

    class Spectrogram(nn.Module):
        def __init__(self, n_fft, hop_length, win_length, window_fn, **options):
            super().__init__()
            assert options == dict(normalized=True, center=False, pad_mode=None, power=None)
            self.call = n_fft, hop_length, win_length, window_fn(win_length)

        def forward(self, x):
            n_fft, hop, length, window = self.call
            flat = x.flatten(0, 1)
            found = torch.stft(flat, n_fft, hop, length, window, center=False, return_complex=True)
            return (found / window.square().sum().sqrt()).unflatten(0, x.shape[:2])

    def normed(*size, norm="none", **options):
        conv = nn.Conv2d(*size, **options)
        return nn.utils.weight_norm(conv) if norm == "weight_norm" else conv

    found = importlib.util.find_spec("encodec")
    if found is None:
        pytest.skip("encodec is not installed")
    audio = types.SimpleNamespace(Spectrogram=Spectrogram)
    source = Path(found.submodule_search_locations[0], "msstftd.py").read_text()
    source = source.replace("from .modules import NormConv2d", "")
    module = types.ModuleType("peer_encodec")
    module.NormConv2d = normed
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchaudio", types.SimpleNamespace(transforms=audio))
        pytest.importorskip("einops")
        exec(compile(source, "msstftd.py", "exec"), module.__dict__)
        module.torchaudio = types.SimpleNamespace(transforms=audio)
    theirs = module.DiscriminatorSTFT(8, n_fft=256, hop_length=64, win_length=256)
    ours = BySpectrum(256, 8)
    with torch.no_grad():
        mine = [*ours.layers.parameters(), *ours.last.parameters()]
        for a, b in zip(mine, theirs.parameters(), strict=True):
            b.copy_(a.view_as(b))
    wave = torch.randn(2, 1, 1000)
    score, features = ours(wave)
    want, layers = theirs(wave)
    torch.testing.assert_close(score, want.flatten(1), rtol=1e-4, atol=1e-5)
    for a, b in zip(features, layers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_batch_of_both_is_each_by_itself():
    judge = codec_discriminators(DiscriminatorConfig.small(scales=1)).eval()
    real, fake = torch.randn(2, 2, 3000).unbind(0)
    both, alone = judge(torch.cat([real, fake])), (judge(real), judge(fake))
    for number, score in enumerate(both.scores):
        want = torch.cat([each.scores[number] for each in alone])
        torch.testing.assert_close(score, want, rtol=1e-4, atol=1e-5)


def test_they_learn_to_tell(waves):
    """Tones from noise, every one of them."""
    judge = codec_discriminators(DiscriminatorConfig.small(windows=(256, 128), scales=1))
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    tones = torch.sin(torch.arange(1600) * torch.tensor([[0.1], [0.2], [0.3]]))
    for step in range(60):
        judged = judge(torch.cat([tones, waves(3, 1600, step)]))
        real, fake = zip(*(each.chunk(2) for each in judged.scores), strict=True)
        losses = [discriminator_loss(r, f) for r, f in zip(real, fake, strict=True)]
        if not step:
            first = [float(each.detach()) for each in losses]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    last = [float(each.detach()) for each in losses]
    assert all(b < 0.5 * a for a, b in zip(first, last, strict=True)), (first, last)


def test_weights_are_drawn_from_the_seed_alone():
    before = torch.get_rng_state()
    small = DiscriminatorConfig.small()
    one, two, other = (codec_discriminators(small, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    wave = torch.randn(1, 2000)
    scores = [each(wave).scores for each in (one, two, other)]
    assert all(torch.equal(a, b) for a, b in zip(*scores[:2], strict=True))
    assert not torch.equal(scores[0][0], scores[2][0])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: DiscriminatorConfig(periods=(), scales=0, windows=()), "no discriminator"),
        (lambda: DiscriminatorConfig(periods=(0,)), "must be positive"),
        (lambda: DiscriminatorConfig(windows=(1024, 3)), "windows have 4 samples or more"),
        (
            lambda: codec_discriminators(DiscriminatorConfig(periods=(30,), scales=0, windows=()))(
                torch.zeros(1, 14)
            ),
            "14 samples are too few for a period of 30",
        ),
        (lambda: DiscriminatorConfig(scales=-1), "must be positive"),
        (lambda: DiscriminatorConfig(share=0.0), r"share of the channels must be in \(0, 1\]"),
        (
            lambda: codec_discriminators(DiscriminatorConfig.small())(torch.zeros(1, 1, 2000)),
            r"wave must be \[B, S\]",
        ),
        (
            lambda: codec_discriminators(DiscriminatorConfig.small())(torch.zeros(1, 900)),
            "900 samples are less than a window of 1024",
        ),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()
