"""The counter's words against the published ones, and what is made of them."""

import pytest
import torch

from stillhouse.ops.random import philox_gumbel, philox_words

# Known answers of Random123 (kat_vectors, philox4x32 10).
KNOWN = [
    ((0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((-1, -1, -1, -1), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x299F31D0A4093822, 0x85A308D3243F6A88 - 2**64, 0x13198A2E, 0x03707344),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("place", "words"), KNOWN)
def test_known_answers(place, words):
    assert philox_words(*place).tolist() == [int(word, 16) for word in words.split()]


def test_places_broadcast():
    words = philox_words(7, torch.arange(3)[:, None], torch.arange(2), 5)
    assert words.shape == (3, 2, 4)
    assert torch.equal(words[2, 1], philox_words(7, 2, 1, 5))


def test_gumbel_noise():
    """Its distribution function is exp(-exp(-x)), its mean Euler's constant."""
    noise = philox_gumbel(3, torch.arange(20_000), 0, 10)
    assert noise.shape == (20_000, 10)
    for x in (-1.0, 0.0, 1.0, 3.0):
        share = (noise < x).double().mean().item()
        assert share == pytest.approx(torch.tensor(-x).exp().neg().exp().item(), abs=0.005)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert torch.equal(noise[:, :7], philox_gumbel(3, torch.arange(20_000), 0, 7))
