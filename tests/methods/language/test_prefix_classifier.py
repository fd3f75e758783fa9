"""Classifiers of prefixes against probabilities that are known."""

import doctest

import pytest
import torch

from stillhouse.methods.language import (
    LengthAttribute,
    conditional_beam_search,
    exact_length_mode,
    prefix_classifier,
    train_prefix_classifier,
)

END = 3
# Tokens 0, 1, 2 and the end: after 0 a text ends rarely, after 2 often.
TABLE = torch.tensor(
    [[0.5, 0.3, 0.15, 0.05], [0.3, 0.3, 0.2, 0.2], [0.1, 0.2, 0.2, 0.5], [0.6, 0.3, 0.1, 0.0]]
).double()
CLASSES = 6  # 0 to 4 tokens to follow, or more


@pytest.fixture(scope="module")
def sampled():
    """(state [N, 4], token [N], tokens that follow it [N]) of 4,000 texts of the chain."""
    generator = torch.Generator().manual_seed(0)
    states, tokens, follow = [], [], []
    for _ in range(4000):
        text = [END]
        while len(text) < 40 and (len(text) == 1 or text[-1] != END):
            text.append(int(torch.multinomial(TABLE[text[-1]], 1, generator=generator)))
        for place in range(1, len(text) - 1):
            states.append(text[place - 1])
            tokens.append(text[place])
            follow.append(min(len(text) - 2 - place, CLASSES - 1))
    return torch.eye(4)[states], torch.tensor(tokens), torch.tensor(follow)


@pytest.fixture(scope="module")
def classifier(sampled):
    return train_prefix_classifier(*sampled, vocabulary=4, classes=CLASSES, steps=800)


def following(count):
    """P(exactly `count` tokens follow | token), [4]: powers of the chain without its end."""
    move, ends = TABLE[:3, :3], TABLE[:3, END]
    return torch.linalg.matrix_power(move, count) @ ends


def test_it_learns_the_probabilities_of_the_chain(classifier):
    tokens = torch.arange(3)[None].expand(4, -1)
    empty = torch.empty(4, 0, dtype=torch.int64)
    for n in (1, 2, 4):
        q = LengthAttribute(classifier, n, eos=END)(empty, tokens, torch.eye(4))
        want = following(n - 1).float().expand(4, -1)
        # Whatever the state was: behind the next token it is forgotten.
        torch.testing.assert_close(q[[0, 1, 3]], want[[0, 1, 3]], rtol=0, atol=0.05)


def test_the_end_is_an_indicator(classifier):
    tokens = torch.tensor([[0, END]])
    for length in range(5):
        ids = torch.zeros(1, length, dtype=torch.int64)
        q = LengthAttribute(classifier, 3, eos=END)(ids, tokens, torch.eye(4)[:1])
        assert q[0, 1] == (length == 3)
        assert (q[0, 0] > 0) == (length < 3)


def test_it_leads_a_beam_of_one_to_the_mode(classifier):
    def step(ids):
        last = ids[:, -1] if ids.shape[1] else torch.full((len(ids),), END)
        return TABLE[last].log(), torch.eye(4)[last]

    for n in (1, 2, 3):
        attribute = LengthAttribute(classifier, n, eos=END)
        found = conditional_beam_search(step, attribute, beam=1, max_length=n + 1, eos=END)[0]
        assert found.finished
        assert found.ids.tolist() == exact_length_mode(step, n, eos=END).ids.tolist()


def test_two_classes_are_an_attribute(sampled):
    """`Nothing follows` is the probability of the end after the token."""
    states, tokens, follow = sampled
    labels = (follow == 0).long()
    classifier = train_prefix_classifier(states, tokens, labels, vocabulary=4, steps=400)
    q = classifier.attribute(torch.empty(1, 0), torch.tensor([[0, 1, 2]]), torch.eye(4)[:1])
    torch.testing.assert_close(q[0], TABLE[:3, END].float(), rtol=0, atol=0.05)


def test_the_same_seed_is_the_same_classifier(sampled):
    before = torch.get_rng_state()
    options = dict(vocabulary=4, classes=CLASSES, steps=3)
    made = [train_prefix_classifier(*sampled, **options, seed=seed) for seed in (1, 1, 2)]
    weights = [each.head.weight for each in made]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not weights[0].requires_grad
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n", [0, CLASSES])
def test_lengths_that_were_not_trained(classifier, n):
    with pytest.raises(ValueError, match=f"trained for lengths 1 to 5, got {n}") as raised:
        LengthAttribute(classifier, n, eos=END)
    assert "\n" not in str(raised.value)


def test_bad_examples():
    some = torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(2).long()
    with pytest.raises(ValueError, match="2 states, 2 tokens and 1 labels"):
        train_prefix_classifier(*some[:2], some[2][:1], vocabulary=4)
    with pytest.raises(ValueError, match="at least one"):
        train_prefix_classifier(*(each[:0] for each in some), vocabulary=4)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\)"):
        train_prefix_classifier(*some[:2], some[2] + 2, vocabulary=4)


def test_the_examples():
    assert doctest.testmod(prefix_classifier).failed == 0
