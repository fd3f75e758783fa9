"""Decoding in a few steps: by hand, ends, shares, samples."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from stillhouse.methods.language.unrolled_decoding import refine, sample


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def table(seed=0, width=5):
    """Logits that depend on the token itself and on the one to its left."""
    weight = torch.randn(width, width, width, generator=seeded(seed))
    return lambda y: weight[y, y.roll(1, 1)]


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_argmax_unrolled_by_hand(share, steps):
    logits_of = table()
    y = torch.randint(5, (6, 7), generator=seeded(3))
    lengths = torch.tensor([7, 7, 3, 1, 5, 4])
    mask = torch.arange(7) < lengths[:, None]
    found = refine(logits_of, y, mask, steps=steps, share=share, generator=seeded())
    for _ in range(steps):
        probabilities = logits_of(y).softmax(-1)
        likeliest = probabilities.argmax(-1)
        then = logits_of(likeliest).argmax(-1)
        y = likeliest.clone()
        for row, n in enumerate(lengths.tolist()):
            order = sorted(range(n), key=lambda i: probabilities[row, i].max().item())
            for i in order[: math.ceil(share * n)]:
                y[row, i] = then[row, i]
    assert torch.equal(found[mask], y[mask])


def test_a_perfect_model_needs_one_step():
    target = torch.tensor([[3, 1, 4, 1]])
    calls = []

    def certain(y):
        calls.append(y)
        return 9.0 * one_hot(target, 5)

    y = torch.zeros_like(target)
    found = refine(certain, y, target >= 0, steps=50, generator=seeded())
    assert torch.equal(found, target)
    # The second step changes nothing: it is the last.
    assert len(calls) == 4


def test_sampling_updates_a_share_of_the_tokens():
    y = torch.zeros(200, 50, dtype=torch.int64)
    mask = torch.arange(50) < torch.tensor([50, 20]).repeat(100)[:, None]
    other = lambda y: 9.0 * one_hot(torch.ones_like(y), 5)  # noqa: E731
    found = refine(other, y, mask, steps=1, mode="sample", share=0.3, generator=seeded())
    assert not found[~mask].any()
    assert found[mask].float().mean().item() == pytest.approx(0.3, abs=0.02)
    again = refine(other, y, mask, steps=3, mode="sample", share=0.3, generator=seeded())
    assert again[mask].float().mean().item() == pytest.approx(1 - 0.7**3, abs=0.02)


@pytest.mark.parametrize(("steps", "calls"), [(4, 4), (10, 10), (40, 10)])
def test_sampling_ends_after_ten_steps_where_nothing_changes(steps, calls):
    seen = []

    def certain(y):
        seen.append(y)
        return 99.0 * one_hot(torch.full_like(y, 2), 5)

    y = torch.full((1, 3), 2)
    refine(certain, y, y > 0, steps=steps, mode="sample", generator=seeded())
    assert len(seen) == calls


def test_samples_follow_the_softmax_at_their_temperature():
    logits = torch.tensor([0.0, 1.0, -1.0])
    drawn = sample(logits.expand(100, 200, 3), 0.4, seeded())
    frequencies = torch.bincount(drawn.flatten(), minlength=3) / drawn.numel()
    assert torch.allclose(frequencies, (logits / 0.4).softmax(0), atol=0.01)
    assert drawn.shape == (100, 200)
