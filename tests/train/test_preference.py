"""Preference losses against closed forms."""

import math

import pytest
import torch

from stillhouse.train import preference_loss

KINDS = ("sigmoid", "kto_pair", "hinge", "ipo")
SMOOTHED = [*((kind, 0.0) for kind in KINDS), ("sigmoid", 0.2)]


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    policy, reference = 4 * torch.randn(2, 6, 2, generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), reference


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    [
        ("sigmoid", math.log(2), -0.05),
        ("kto_pair", 0.5, -0.0125),
        ("hinge", 1.0, -0.1),
        ("ipo", 25.0, -10.0),
    ],
)
def test_where_policy_and_reference_agree(kind, value, slope):
    """The value, and the slope -beta / 2 of DPO in the difference, -beta / 8 in each half of KTO's
    (the mean of two, each with sigmoid' = 1/4), -beta of the hinge, -1 / beta of IPO."""
    policy = torch.tensor([[-10.0, -12.0]], dtype=torch.float64, requires_grad=True)
    found = preference_loss(policy, policy.detach().clone(), kind=kind)
    assert found["loss"].item() == pytest.approx(value, rel=1e-12)
    (gradient,) = torch.autograd.grad(found["loss"], policy)
    assert gradient.tolist() == [[pytest.approx(slope), pytest.approx(-slope)]]
    assert found["margin"] == found["accuracy"] == 0


def by_hand(kind, policy, reference, beta, smoothing):
    """Each pair in plain Python."""
    gains = [(p - r) for p, r in zip(policy[:, 0], reference[:, 0], strict=True)]
    others = [(p - r) for p, r in zip(policy[:, 1], reference[:, 1], strict=True)]

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    above, below = max(0, sum(gains) / len(gains)), max(0, sum(others) / len(others))
    losses = []
    for gain, other in zip(gains, others, strict=True):
        d = gain - other
        if kind == "sigmoid":
            kept, swapped = math.log(sigmoid(beta * d)), math.log(sigmoid(-beta * d))
            losses.append(-(1 - smoothing) * kept - smoothing * swapped)
        elif kind == "hinge":
            losses.append(max(0, 1 - beta * d))
        elif kind == "ipo":
            losses.append((d - 1 / (2 * beta)) ** 2)
        else:
            losses.append(1 - sigmoid(beta * (gain - below)))
            losses.append(1 - sigmoid(beta * (above - other)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("beta", [0.1, 1.3])
@pytest.mark.parametrize(
    ("kind", "smoothing"), [*((kind, 0.0) for kind in KINDS), ("sigmoid", 0.2)]
)
def test_values_by_hand(pairs, kind, beta, smoothing):
    policy, reference = pairs
    found = preference_loss(policy, reference, kind=kind, beta=beta, label_smoothing=smoothing)
    numbers = policy.detach().numpy(), reference.numpy()
    assert found["loss"].item() == pytest.approx(by_hand(kind, *numbers, beta, smoothing), rel=1e-9)
    r = policy.detach() - reference
    torch.testing.assert_close(found["preferred_reward"], beta * r[:, 0].mean())
    torch.testing.assert_close(found["other_reward"], beta * r[:, 1].mean())
    torch.testing.assert_close(found["margin"], beta * (r[:, 0] - r[:, 1]).mean())
    assert found["accuracy"] == (r[:, 0] > r[:, 1]).double().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(pairs, kind):
    policy, reference = pairs
    if kind == "kto_pair":
        # The batch means are constants to the gradient: central differences of that loss.
        r = policy.detach() - reference
        above, below = r.mean(0).clamp(min=0)
        assert above > 0 or below > 0

        def loss(x):
            y = x - reference
            gained = 1 - torch.sigmoid(0.1 * (y[:, 0] - below))
            lost = 1 - torch.sigmoid(0.1 * (above - y[:, 1]))
            return (gained + lost).mean() / 2

        (found,) = torch.autograd.grad(preference_loss(*pairs, kind=kind)["loss"], policy)
        (want,) = torch.autograd.grad(loss(policy), policy)
        torch.testing.assert_close(found, want)
    else:
        assert torch.autograd.gradcheck(
            lambda x: preference_loss(x, reference, kind=kind)["loss"], policy
        )


def test_only_the_loss_has_a_gradient(pairs):
    parts = preference_loss(*pairs)
    assert [name for name, each in parts.items() if each.requires_grad] == ["loss"]


def test_far_apart_it_stays_finite():
    policy = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    loss = preference_loss(policy, torch.zeros(1, 2), beta=1.0)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert policy.grad.tolist() == [[-1.0, 1.0]]


def test_an_empty_batch_has_no_loss():
    policy = torch.zeros(0, 2, requires_grad=True)
    for kind in KINDS:
        parts = preference_loss(policy, torch.zeros(0, 2), kind=kind)
        parts["loss"].backward()
        assert all(each == 0 for each in parts.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kind="dpo"), "kind must be sigmoid, kto_pair, hinge or ipo, got 'dpo'"),
        (dict(policy=torch.zeros(4)), r"must be \[B, 2\]"),
        (dict(reference=torch.zeros(3, 2)), r"got \(4, 2\) and \(3, 2\)"),
        (dict(reference=torch.zeros(4, 2, requires_grad=True)), "no gradient flows to the ref"),
        (dict(beta=0.0), "beta must be a positive number, got 0.0"),
        (dict(label_smoothing=0.5), "label_smoothing is of 'sigmoid'"),
        (dict(kind="ipo", label_smoothing=0.1), "got 0.1 with 'ipo'"),
    ],
)
def test_bad_input(changes, message):
    options = dict(policy=torch.zeros(4, 2), reference=torch.zeros(4, 2)) | changes
    with pytest.raises(ValueError, match=message):
        preference_loss(**options)
