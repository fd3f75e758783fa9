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
    """waves(B, S, seed=0): noise with some colour, of a loudness like speech's."""

    def make(count, samples, seed=0):
        generator = torch.Generator().manual_seed(seed)
        white = torch.randn(count, samples + 8, generator=generator)
        return 0.3 * white.unfold(1, 9, 1).mean(-1) * 3

    return make


@pytest.fixture
def tiny():
    """tiny(seed=0, **changes): a codec with a hop of 6 samples and four stages of eight codes."""
    from stillhouse.methods.speech import CodecConfig, SpeechCodec

    def make(seed=0, **changes):
        return SpeechCodec(CodecConfig(**(SIZES | changes)), seed=seed)

    return make
