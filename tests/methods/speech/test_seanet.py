"""The codec: sizes of the published model, the same layers in transformers, what looks ahead, codes
and stages, and gradients."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from stillhouse import ops
from stillhouse.methods.speech import CodecConfig, SpeechCodec
from stillhouse.methods.speech.seanet_blocks import (
    PaddedConv,
    PaddedTransposed,
    ResidualUnit,
    SkipLSTM,
)
from stillhouse.methods.speech.stages import stage_average, stage_range

DOUBLE = torch.float64


def count(module):
    return sum(each.numel() for each in module.parameters())


def test_the_published_sizes():
    """With the trainer's map from 1024 to 768 features the released model has 103.68M."""
    config = CodecConfig()
    assert (config.hop, config.frame_rate, config.bit_rate) == (320, 50.0, 4000.0)
    with torch.device("meta"):
        codec = SpeechCodec(config)
        wave = torch.zeros(2, 1, 48000)
    encoded = codec.encoder(wave)
    assert encoded.shape == (2, 1024, 150)
    assert codec.decoder(encoded).shape == (2, 1, 48000)
    assert codec.quantizer.codebooks.shape == (8, 1024, 1024)

    def conv(a, b, k):  # bias, and a length for each channel beside the direction
        return a * b * k + 2 * b

    def lstm(width, directions):
        return directions * 2 * (4 * width) * (2 * width + 2) + (directions - 1) * 4 * width * width

    def unit(c):
        return conv(c, c // 2, 3) + conv(c // 2, c, 1) + conv(c, c, 1)

    widths = [64, 128, 256, 512, 1024]
    encoder = conv(1, 64, 7) + lstm(1024, 1) + conv(2048, 1024, 7)
    # Both directions; the second layer reads both.
    encoder += lstm(1024, 1) + 2 * 4 * 1024 * 1024
    decoder = conv(1024, 1024, 7) + lstm(1024, 1) + conv(64, 1, 7)
    for a, b, stride in zip(widths[:-1], widths[1:], config.strides, strict=True):
        encoder += unit(a) + conv(a, b, 2 * stride)
        # A transposed convolution has its lengths by the channels it reads.
        decoder += unit(a) + a * b * 2 * stride + a + b
    assert count(codec.encoder) == encoder
    assert count(codec.decoder) == decoder
    assert count(codec) + 1024 * 768 + 768 == 103_675_586


def test_the_small_one_is_small():
    codec = SpeechCodec(CodecConfig.small())
    assert count(codec) < 1_000_000
    assert codec.config.frame_rate == 50
    kept = json.loads(json.dumps(dataclasses.asdict(codec.config)))
    assert CodecConfig(**kept) == codec.config


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", ["reflect", "constant"])
def test_the_layers_are_those_of_transformers(causal, padding):
    """EnCodec's halves, which are SEANet with a one-way LSTM: weights handed over in order, waves
    of whole frames, of others, and shorter than a reflection."""
    encodec = pytest.importorskip("transformers.models.encodec.modeling_encodec")
    config = CodecConfig(
        strides=(2, 3, 4), width=4, dim=6, residual_units=2, bidirectional=False, causal=causal,
        padding=padding,
    )  # fmt: skip
    ours = SpeechCodec(config).double()
    sizes = encodec.EncodecConfig(
        upsampling_ratios=[4, 3, 2], num_filters=4, hidden_size=6, num_residual_layers=2,
        use_causal_conv=causal, pad_mode=padding, num_lstm_layers=2, codebook_dim=6,
    )  # fmt: skip
    pairs = [
        (ours.encoder, encodec.EncodecEncoder(sizes).double()),
        (ours.decoder, encodec.EncodecDecoder(sizes).double()),
    ]
    for mine, theirs in pairs:
        assert count(mine) == count(theirs)
        with torch.no_grad():
            for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
                assert a.shape == b.shape
                b.copy_(a)
    for samples in (24, 25, 47, 240, 250):
        wave = torch.randn(2, 1, samples, dtype=DOUBLE)
        encoded = ours.encoder(wave)
        assert encoded.shape == (2, 6, -(-samples // 24))
        torch.testing.assert_close(encoded, pairs[0][1](wave), rtol=1e-10, atol=1e-12)
        audio = ours.decoder(encoded)
        assert audio.shape == (2, 1, 24 * encoded.shape[-1])
        torch.testing.assert_close(audio, pairs[1][1](encoded), rtol=1e-10, atol=1e-12)


def test_both_directions_double_the_width():
    layer = SkipLSTM(3, 2, bidirectional=True).double()
    x = torch.randn(2, 3, 5, dtype=DOUBLE)
    y = layer(x)
    assert y.shape == (2, 6, 5)
    torch.testing.assert_close(y, layer.lstm(x.mT)[0].mT + torch.cat([x, x], 1))
    # The last frame reaches the first one, by the second half at least.
    x[..., -1] += 1
    assert (layer(x) - y)[..., 0].abs().max() > 0
    assert (SkipLSTM(3, 1)(x.float()).shape) == (2, 3, 5)
    without = SpeechCodec(CodecConfig(width=4, dim=6, lstm_layers=0, codebook_size=4))
    assert not any(isinstance(each, nn.LSTM) for each in without.modules())


LOOKS = [(True, "constant"), (True, "reflect"), (False, "reflect")]


@pytest.mark.parametrize(("causal", "padding"), LOOKS)
def test_what_looks_ahead(tiny, causal, padding):
    """A causal codec's frames, and its samples, do not know what comes; reflected ones at the very
    beginning do; the others all around."""
    codec = tiny(causal=causal, padding=padding).double()
    wave = torch.randn(1, 120, dtype=DOUBLE)
    changed = wave.clone()
    changed[:, 60:] += 1
    before, after = (codec.encoder(x[:, None]) for x in (wave, changed))
    differs = (before != after).any(1)[0]
    assert differs[10:].all()
    assert bool(differs[:10].any()) == (not causal)
    frames = torch.randn(1, 6, 20, dtype=DOUBLE)
    later = frames.clone()
    later[..., 10:] += 1
    differs = (codec.decoder(frames) != codec.decoder(later))[0, 0]
    assert differs[60:].all()
    assert bool(differs[:60].any()) == (not causal)
    if causal:
        changed = wave.clone()
        changed[:, 5] += 1
        differs = (codec.encoder(changed[:, None]) != before).any(1)[0]
        assert differs[0]
        changed[:, :6] = wave[:, :6]
        changed[:, 6] += 1
        differs = (codec.encoder(changed[:, None]) != before).any(1)[0]
        assert bool(differs[0]) == (padding == "reflect")


def test_encoding_and_decoding_are_the_two_halves_of_a_call(tiny, waves):
    codec = tiny()
    wave = waves(2, 301)
    codec(wave)  # the tables begin
    codec.eval()
    found = codec(wave, return_stages=("1:Q",))
    codes = codec.encode(wave)
    assert codes.shape == (2, 51, 4)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, found.codes)
    assert 0 <= int(codes.min()) <= int(codes.max()) < 8
    assert found.audio.shape == wave.shape
    audio = codec.decode(codes)
    assert audio.shape == (2, 51 * 6)
    torch.testing.assert_close(audio[:, :301], found.audio)
    for n in (1, 3):
        assert torch.equal(codec.encode(wave, n), codes[..., :n])
        assert torch.equal(codec(wave, num_quantizers=n).codes, codes[..., :n])
        dropped = codes.clone()
        dropped[..., n:] = -1
        torch.testing.assert_close(codec.decode(codes[..., :n]), codec.decode(dropped))
        torch.testing.assert_close(
            codec(wave, num_quantizers=n).audio, codec.decode(dropped)[:, :301]
        )
    assert found.commit_loss.shape == (4,)
    encoded = codec.encoder(wave[:, None]).mT
    left = encoded - ops.rvq_decode(codes[..., :2], codec.quantizer.codebooks)
    torch.testing.assert_close(found.commit_loss[1], left.square().mean())


def test_a_wave_of_one_frame(tiny, waves):
    codec = tiny(lstm_layers=0)
    assert codec(waves(1, 6)).audio.shape == (1, 6)
    assert codec.encode(waves(1, 7)).shape == (1, 2, 4)


# ---- stages


@pytest.mark.parametrize(
    ("stage", "ends"),
    [(1, (1, 1)), ("1", (1, 1)), (8, (8, 8)), ("1:8", (1, 8)), ("1:Q", (1, 8)), ("2:5", (2, 5))],
)
def test_names_of_stages(stage, ends):
    assert stage_range(stage, 8) == ends


@pytest.mark.parametrize("stage", [0, 9, "1:9", "5:2", "Q", "first", "1-8", ":3", "2:", None, 1.5])
def test_stages_that_do_not_exist(stage):
    with pytest.raises(ValueError, match="stages are 1 to 8|a stage is a number") as raised:
        stage_range(stage, 8)
    assert "\n" not in str(raised.value)


def test_values_and_slopes_of_stages():
    """The codes' own vectors to the last bit; to what is quantized the identity over their number,
    in whichever stages, and nothing to the tables."""
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(4, 8, 6, generator=generator, requires_grad=True)
    encoded = torch.randn(2, 5, 6, generator=generator, requires_grad=True)
    codes = ops.rvq_encode(encoded.detach(), tables.detach())
    upstream = torch.randn(2, 5, 6, generator=generator)
    for first, last in ((1, 1), (3, 3), (4, 4), (2, 3), (1, 4)):
        found = stage_average(encoded, codes, tables, first, last)
        picked = [tables[s, codes[..., s]] for s in range(first - 1, last)]
        want = sum(picked[1:], picked[0]) / len(picked)
        assert torch.equal(found, want) or len(picked) > 1
        torch.testing.assert_close(found, want)
        slopes = torch.autograd.grad(found, (encoded, tables), upstream, allow_unused=True)
        torch.testing.assert_close(slopes[0], upstream / len(picked))
        assert slopes[1] is None
    whole = ops.rvq(encoded, tables.detach()).out / 4
    torch.testing.assert_close(stage_average(encoded, codes, tables, 1, 4), whole)


def test_the_released_recursion_gives_later_stages_no_slope():
    """r <- r - q with q straight through is a constant: what later stages say stays there."""
    encoded = torch.randn(3, 6, requires_grad=True)
    tables, residual, slopes = torch.randn(3, 8, 6), encoded, []
    for table in tables:
        nearest = table[torch.cdist(residual.detach(), table).argmin(-1)]
        q = residual + (nearest - residual).detach()
        slopes.append(torch.autograd.grad(q.square().sum(), encoded, retain_graph=True)[0])
        residual = residual - q
    assert slopes[0].abs().max() > 0
    assert slopes[1].abs().max() == slopes[2].abs().max() == 0


def test_a_later_stage_teaches_the_encoder(tiny, waves):
    codec = tiny()
    found = codec(waves(2, 120), return_stages=(3, "1:Q", "1"))
    assert list(found.stages) == [3, "1:Q", "1"]
    found.stages[3].square().sum().backward()
    for name, parameter in codec.encoder.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert all(each.grad is None for each in codec.decoder.parameters())


def test_in_training_stages_are_of_the_tables_that_gave_the_codes(tiny, waves):
    """In every step, the first one included, for all that the tables move within it."""
    codec = tiny(decay=0.5)
    for seed in range(3):
        before = codec.quantizer.codebooks.clone()
        found = codec(waves(2, 300, seed), return_stages=(2, "1:Q"))
        assert not torch.equal(codec.quantizer.codebooks, before)
        if seed:
            torch.testing.assert_close(found.stages[2], before[1][found.codes[..., 1]])
        # What the decoder was given is the sum of all.
        whole = codec.decoder((4 * found.stages["1:Q"]).mT)[:, 0]
        torch.testing.assert_close(whole, found.audio)


# ---- layers


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_the_layers(causal):
    options = dict(causal=causal, padding="reflect")
    for layer, channels in (
        (PaddedConv(2, 3, 4, stride=2, **options), 2),
        (PaddedTransposed(2, 3, 3, causal=causal), 2),
        (ResidualUnit(4, 3, 2, 2, **options), 4),
        (SkipLSTM(2, 1, bidirectional=True), 2),
    ):
        layer = layer.double()
        x = torch.randn(1, channels, 7, dtype=DOUBLE, requires_grad=True)
        names, weights = zip(*layer.named_parameters(), strict=True)

        def call(x, *given, layer=layer, names=names):
            return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

        assert torch.autograd.gradcheck(call, (x, *weights))


@pytest.mark.parametrize(
    "sizes",
    [dict(), dict(residual_units=3), dict(strides=(8, 8, 5), lstm_layers=0), dict(width=32)],
)
def test_a_signal_keeps_its_size_through_all_layers(sizes):
    """And what tells its frames apart is most of it; the audio is as loud as speech."""
    codec = SpeechCodec(CodecConfig.small(**sizes))
    with torch.no_grad():
        encoded = codec.encoder(0.1 * torch.randn(4, 1, 6400))
        audio = codec.decoder(torch.randn_like(encoded))
    apart = encoded - encoded.mean(-1, keepdim=True)
    assert 0.15 < float(encoded.std()) < 1.5
    assert float(apart.std()) > 0.8 * float(encoded.std())
    assert 0.04 < float(audio.std()) < 0.25


def test_what_the_quantizer_is_told(tiny):
    quantizer = tiny(seed=3, decay=0.7, dead_code_threshold=0.3).quantizer
    assert (quantizer.decay, quantizer.dead_code_threshold) == (0.7, 0.3)
    assert (quantizer.seed, quantizer.commitment_weight, quantizer.grad) == (3, 1.0, "ste")


def test_weights_are_drawn_from_the_seed_alone(tiny):
    before = torch.get_rng_state()
    one, two, three = tiny(), tiny(), tiny(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.encoder[0].conv.weight, three.encoder[0].conv.weight)


def test_a_codec_comes_back(tiny, waves, tmp_path):
    codec = tiny()
    codec(waves(2, 300))
    torch.save(codec.state_dict(), tmp_path / "codec.pt")
    other = tiny(seed=5)
    other.load_state_dict(torch.load(tmp_path / "codec.pt"))
    wave = waves(1, 300, seed=3)
    assert torch.equal(other.eval().encode(wave), codec.eval().encode(wave))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda c: c(torch.zeros(2, 1, 60)), r"wave must be \[B, S\], got \(2, 1, 60\)"),
        (lambda c: c(torch.zeros(2, 5)), "5 samples are less than a frame of 6"),
        (lambda c: c.encode(torch.zeros(2, 5)), "5 samples are less than a frame of 6"),
        (lambda c: c(torch.zeros(2, 60), sample_rate=8000), "at 8000 Hz, the codec at 16000"),
        (lambda c: c.encode(torch.zeros(2, 60), sample_rate=8000), "resample it"),
        (lambda c: c(torch.zeros(2, 60), num_quantizers=0), "must be 1 to 4, got 0"),
        (lambda c: c.encode(torch.zeros(2, 60), 5), "must be 1 to 4, got 5"),
        (lambda c: c(torch.zeros(2, 60), return_stages=(5,)), "stages are 1 to 4, got 5"),
        (
            lambda c: c(torch.zeros(2, 60), num_quantizers=2, return_stages=(3,)),
            "stages are 1 to 2, got 3",
        ),
        (lambda c: c.decode(torch.zeros(2, 5, 5).long()), r"codes must be \[B, T, 1 to 4\]"),
        (lambda c: c.decode(torch.zeros(2, 5).long()), r"codes must be \[B, T, 1 to 4\]"),
        (lambda c: c.decode(torch.zeros(2, 0, 4).long()), r"codes must be \[B, T, 1 to 4\]"),
    ],
)
def test_bad_input(tiny, act, message):
    with pytest.raises(ValueError, match=message) as raised:
        act(tiny())
    assert "\n" not in str(raised.value)


def test_waves_of_other_types_are_refused(tiny):
    for act in (tiny(), tiny().encode):
        with pytest.raises(TypeError, match="wave must be a float tensor, got torch.int64"):
            act(torch.zeros(2, 60).long())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(width=0), "width must be at least 1, got 0"),
        (dict(num_quantizers=0), "num_quantizers must be at least 1"),
        (dict(lstm_layers=-1), "lstm_layers must be at least"),
        (dict(strides=()), "strides must be positive"),
        (dict(strides=(2, 0)), "strides must be positive"),
        (dict(width=1), "a bottleneck of 1 / 2 channels has none"),
        (dict(causal=True), "cannot look both ways"),
        (dict(padding="same"), "padding must be 'reflect' or 'constant'"),
    ],
)
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        CodecConfig(**sizes)
