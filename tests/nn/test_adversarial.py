"""Losses of two players: closed forms, slopes, masks; the turned gradient."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from stillhouse.nn import GradientReversal, discriminator_loss, generator_loss
from stillhouse.nn.adversarial import FORMS

DOUBLE = torch.float64
each_form = pytest.mark.parametrize("form", FORMS)


def scores(*shape, seed=0, form="lsgan"):
    x = torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    return x.sigmoid() if form == "bce" else x


@pytest.mark.parametrize(
    ("form", "real", "fake", "of_discriminator", "of_generator"),
    [
        ("lsgan", 0.25, 0.5, 0.75**2 + 0.5**2, 0.5**2),
        ("lsgan", 1.0, 0.0, 0.0, 1.0),
        ("hinge", 0.25, -0.5, 0.75 + 0.5, 0.5),
        ("hinge", 1.5, -2.0, 0.0, 2.0),
        ("softplus", 0.0, 0.0, 2 * math.log(2), math.log(2)),
        ("softplus", 2.0, -1.0, math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)),
         math.log1p(math.exp(1))),
        ("bce", 0.8, 0.3, -math.log(0.8) - math.log(0.7), -math.log(0.3)),
        ("bce", 0.5, 0.5, 2 * math.log(2), math.log(2)),
    ],
)  # fmt: skip
def test_closed_forms(form, real, fake, of_discriminator, of_generator):
    real, fake = (torch.tensor([x], dtype=DOUBLE) for x in (real, fake))
    found = float(discriminator_loss(real, fake, form)), float(generator_loss(fake, form))
    assert found == pytest.approx((of_discriminator, of_generator), abs=1e-12)


def test_softplus_is_the_cross_entropy_of_logits_and_bce_that_of_probabilities():
    real, fake = scores(40), scores(30, seed=1)
    want = binary_cross_entropy_with_logits(real, torch.ones_like(real))
    want = want + binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    torch.testing.assert_close(discriminator_loss(real, fake, "softplus"), want)
    probabilities = discriminator_loss(real.sigmoid(), fake.sigmoid(), "bce")
    torch.testing.assert_close(probabilities, want)
    far = torch.tensor([200.0, -200.0])
    assert float(generator_loss(far, "softplus")) == pytest.approx(100.0)


@each_form
def test_means_of_each_discriminator_are_summed(form):
    real, fake = (
        [scores(3, 5, seed=s, form=form), scores(7, seed=s + 1, form=form)] for s in (0, 2)
    )
    parts = [discriminator_loss(r, f, form) for r, f in zip(real, fake, strict=True)]
    torch.testing.assert_close(discriminator_loss(real, fake, form), sum(parts))
    parts = [generator_loss(f, form) for f in fake]
    torch.testing.assert_close(generator_loss(fake, form), sum(parts))


@each_form
def test_masked_scores_are_not_read(form):
    real, fake = scores(2, 6, form=form), scores(2, 6, seed=1, form=form)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    want = discriminator_loss(real[mask], fake[mask], form)
    spoiled = [x.masked_fill(~mask, float("nan")).requires_grad_() for x in (real, fake)]
    found = discriminator_loss(*spoiled, form, mask)
    torch.testing.assert_close(found, want)
    for x, slope in zip(spoiled, torch.autograd.grad(found, spoiled), strict=True):
        assert slope[~mask].abs().max() == 0
        assert slope[mask].isfinite().all(), x
    nothing = discriminator_loss(*spoiled, form, torch.zeros_like(mask))
    assert float(nothing.detach()) == 0
    torch.testing.assert_close(
        generator_loss([spoiled[1]], form, [mask]), generator_loss(fake[mask], form)
    )


@each_form
def test_gradients(form):
    real, fake = (scores(4, 3, seed=s, form=form).requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(lambda r, f: discriminator_loss(r, f, form), (real, fake))
    assert torch.autograd.gradcheck(lambda f: generator_loss(f, form), fake)
    loss = discriminator_loss(real, fake, form)
    to_real, to_fake = torch.autograd.grad(loss, (real, fake))
    if form != "lsgan":  # its parabola turns around at the target
        assert (to_real <= 0).all()
        assert (to_fake >= 0).all()
        assert (torch.autograd.grad(generator_loss(fake, form), fake)[0] < 0).all()


def test_the_best_discriminator_of_equal_sides():
    """Half-way for least squares (loss 1/2), undecided for cross-entropies (2 log 2)."""
    cases = ("lsgan", 0.1, 0.5, 0.5), ("softplus", 0.7, 0.0, 2 * math.log(2))
    for form, start, best, value in cases:
        score = torch.tensor(start, dtype=DOUBLE, requires_grad=True)
        optimizer = torch.optim.SGD([score], lr=0.3)
        for _ in range(200):
            optimizer.zero_grad()
            discriminator_loss(score[None], score[None], form).backward()
            optimizer.step()
        score = score.detach()[None]
        assert float(score) == pytest.approx(best, abs=1e-6)
        assert float(discriminator_loss(score, score, form)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2), torch.zeros(2), "wgan"), "form must be one of lsgan, hinge"),
        (([torch.zeros(2)], [torch.zeros(2)] * 2), "scores of 1 discriminators and of 2"),
        (([], []), "no scores"),
        ((torch.zeros(2), torch.zeros(2), "lsgan", torch.ones(3) > 0), r"mask must be bool \(2,\)"),
        ((torch.zeros(2), torch.zeros(2), "lsgan", torch.ones(2)), "mask must be bool"),
        (
            (torch.zeros(2), torch.zeros(2), "lsgan", [torch.ones(2) > 0] * 2),
            "scores of 1 discriminators and 2 masks",
        ),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        discriminator_loss(*arguments)


def test_the_gradient_is_turned_around():
    x = scores(3, 4).requires_grad_()
    layer = GradientReversal(0.25)
    y = layer(x)
    assert torch.equal(y, x)
    upstream = scores(3, 4, seed=1)
    (found,) = torch.autograd.grad(y, x, upstream, create_graph=True)
    assert torch.equal(found, -0.25 * upstream)
    layer.scale = 2.0
    (found,) = torch.autograd.grad(layer(x).sin().sum(), x)
    torch.testing.assert_close(found, -2 * x.cos())
    layer.scale = 0
    assert torch.autograd.grad(layer(x).sum(), x)[0].abs().max() == 0
    assert "scale=0" in repr(layer)
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be a number >= 0"):
            GradientReversal(scale)


def test_the_two_players_under_one_loss():
    """Above the layer the slope goes down, below it up: one step of each moves apart."""
    below, above = (torch.tensor(x, dtype=DOUBLE, requires_grad=True) for x in (0.5, 0.5))
    loss = (above * GradientReversal()(below) - 1).square()
    loss.backward()
    assert float(above.grad) < 0 < float(below.grad)


def test_it_compiles():
    layer = torch.compile(GradientReversal(0.5), fullgraph=True, backend="aot_eager")
    x = torch.ones(3, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.tolist() == [-0.5] * 3
