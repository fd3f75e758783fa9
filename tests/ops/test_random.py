"""The counter's words against the published ones, and what is made of them."""

import pytest
import torch
from scipy.stats import chisquare

from stillhouse.ops import sample_categorical
from stillhouse.ops.random import philox_gumbel, philox_uniform, philox_words

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


def test_uniform_numbers():
    """53 bits of the first two words, the first one's on top, and a half."""
    u = philox_uniform(3, torch.arange(20_000), 1, 2)
    assert u.dtype == torch.float64
    for place in (0, 777):
        first, second = philox_words(3, place, 1, 2).tolist()[:2]
        assert u[place].item() == (first * 2**21 + second // 2**11 + 0.5) / 2**53
    counts = torch.histc(u, 20, 0, 1)
    assert chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("source", ["seed", "generator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_samples_follow_the_softmax(source, dtype):
    row = torch.tensor([0.5, -torch.inf, 2.0, 1.0, -1.0, -torch.inf], dtype=dtype)
    words = {"seed": 5} if source == "seed" else {"generator": torch.Generator().manual_seed(1)}
    drawn = sample_categorical(row.expand(200, 100, 6), **words)
    assert drawn.shape == (200, 100)
    counts = torch.bincount(drawn.flatten(), minlength=6)
    assert counts[[1, 5]].tolist() == [0, 0]
    kept = [0, 2, 3, 4]
    expected = 20_000 * row.double().softmax(-1)[kept]
    assert chisquare(counts[kept].numpy(), expected.numpy()).pvalue > 1e-4


def test_samples_are_of_their_place():
    logits = torch.randn(8, 50)
    position = torch.tensor([4, 9, 4, 1, 0, 7, 2**40, 3])
    drawn = sample_categorical(logits, seed=2, position=position)
    order = torch.tensor([3, 1, 7, 0])
    part = sample_categorical(logits[order], seed=2, position=position[order])
    assert torch.equal(part, drawn[order])
    rows = sample_categorical(logits, seed=2)
    assert torch.equal(rows, sample_categorical(logits, seed=2, position=torch.arange(8)))
    assert not torch.equal(rows, sample_categorical(logits, seed=3))
    cumulated = logits.double().softmax(-1).cumsum(-1)
    u = philox_uniform(2, position, 0, 1)
    assert torch.equal(drawn, torch.searchsorted(cumulated, u[:, None], right=True)[:, 0])


def test_sample_errors():
    logits, generator = torch.zeros(2, 3), torch.Generator()
    for words in ({}, dict(seed=1, generator=generator)):
        with pytest.raises(ValueError, match="needs a generator or a seed, and not both"):
            sample_categorical(logits, **words)
    with pytest.raises(ValueError, match="a position is for a seed"):
        sample_categorical(logits, generator=generator, position=1)
    with pytest.raises(ValueError, match=r"must broadcast to the rows \(2,\), got \(3,\)"):
        sample_categorical(logits, seed=1, position=torch.arange(3))
    with pytest.raises(ValueError, match=r"logits must be \[..., V\] with V >= 1, got \(2, 0\)"):
        sample_categorical(logits[:, :0], seed=1)
    with pytest.raises(TypeError, match="logits must be a float tensor, got torch.int64"):
        sample_categorical(logits.long(), seed=1)
    for bad in (torch.nan, torch.inf):
        broken = logits.clone()
        broken[1, 2] = bad
        with pytest.raises(ValueError, match=r"a row with NaN, \+inf or nothing above -inf"):
            sample_categorical(broken, seed=1)
    with pytest.raises(ValueError, match="nothing above -inf"):
        sample_categorical(torch.full((1, 2), -torch.inf), seed=1)
