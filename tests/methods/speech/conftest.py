"""Codecs of a few channels."""

import pytest
import torch

SIZES = dict(
    strides=(2, 3),
    width=4,
    dim=6,
    codebook_size=8,
    num_quantizers=4,
    lstm_layers=1,
    bidirectional=False,
)


@pytest.fixture
def waves():
    """waves(B, S, seed=0): a voice of sorts, harmonics of a pitch that glides, and some breath."""

    def make(count, samples, seed=0):
        generator = torch.Generator().manual_seed(seed)
        pitch = 0.05 + 0.05 * torch.rand(count, 1, generator=generator)
        glide = 1 + 0.2 * torch.rand(count, 1, generator=generator) * torch.linspace(0, 1, samples)
        phase = (pitch * glide).cumsum(1)
        voice = sum(torch.sin(k * phase) / k for k in (1, 2, 3, 5))
        return 0.2 * voice + 0.02 * torch.randn(count, samples, generator=generator)

    return make


@pytest.fixture
def tiny():
    """tiny(seed=0, **changes): a codec with a hop of 6 samples and four stages of eight codes."""
    from stillhouse.methods.speech import CodecConfig, SpeechCodec

    def make(seed=0, **changes):
        return SpeechCodec(CodecConfig(**(SIZES | changes)), seed=seed)

    return make
