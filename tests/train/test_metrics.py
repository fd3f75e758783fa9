"""How close two models are, and power laws."""

import math

import pytest
import torch

from stillhouse.train import fidelity, power_law_fit
from stillhouse.train.examples import collate


def wanted(model, reference, batches):
    """The same in float64 from whole logits, token by token."""
    q, p, target = [], [], []
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        kept = batch["labels"][:, 1:] != -100
        q.append(model(**inputs).logits[:, :-1][kept].double().log_softmax(-1))
        p.append(reference(**inputs).logits[:, :-1][kept].double().log_softmax(-1))
        target.append(batch["labels"][:, 1:][kept])
    q, p, target = map(torch.cat, (q, p, target))
    nll, reference_nll = (-x.gather(1, target[:, None]).mean() for x in (q, p))
    return {
        "forward_kl": (p.exp() * (p - q)).sum(1).mean(),
        "reverse_kl": (q.exp() * (q - p)).sum(1).mean(),
        "acceptance": torch.minimum(p.exp(), q.exp()).sum(1).mean(),
        "agreement": (p.argmax(1) == q.argmax(1)).double().mean(),
        "loss": nll,
        "perplexity": nll.exp(),
        "reference_perplexity": reference_nll.exp(),
        "tokens": torch.tensor(float(len(target))),
    }


@torch.no_grad()
def test_fidelity_is_a_mean_over_all_targets(llama, examples):
    model, reference = llama(), llama(3, seed=1)
    batches = [collate(examples.examples[start : start + 5]) for start in range(0, 24, 5)]
    found, want = fidelity(model, reference, batches), wanted(model, reference, batches)
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-4), name


def test_fidelity_is_measured_in_evaluation_mode(llama, examples):
    model, reference = llama(attention_dropout=0.9), llama(3, seed=1)
    batches = [collate(examples.examples[:5])]
    expected = fidelity(model, reference, batches)
    model.train()
    assert fidelity(model, reference, batches) == expected
    assert model.training
    assert not reference.training


def test_fidelity_of_callables(llama, examples):
    """A callable sees no attention mask, and in a batch padded on the right needs none."""
    model, reference = llama(), llama(3, seed=1)
    batches = [collate(examples.examples[:7])]
    plain = fidelity(lambda ids: model(input_ids=ids), reference, batches)
    assert plain == pytest.approx(fidelity(model, reference, batches), rel=1e-4)


def test_without_a_target_there_is_no_fidelity(llama):
    with pytest.raises(ValueError, match="no supervised token"):
        fidelity(llama(), llama(), [])


# Power laws ---------------------------------------------------------------------------------------

STEPS = [10 * 1.2**i for i in range(30)]


def test_an_exact_law_is_found():
    law = power_law_fit(STEPS, [math.exp(1) * x**-0.6 for x in STEPS])
    assert law.a == pytest.approx(1.0, abs=1e-12)
    assert law.b == pytest.approx(0.6, abs=1e-12)
    assert law.r2 == pytest.approx(1.0, abs=1e-12)
    assert law.sigma < 1e-12
    assert law(100.0) == pytest.approx(math.e * 100**-0.6)


def test_a_noisy_law_is_what_scipy_s_regression_finds():
    from scipy.stats import linregress

    noise = 0.01 * torch.randn(30, generator=torch.Generator().manual_seed(0)).double()
    y = [math.exp(1 + each) * x**-0.6 for x, each in zip(STEPS, noise.tolist(), strict=True)]
    law = power_law_fit(STEPS, y)
    theirs = linregress([math.log(x) for x in STEPS], [math.log(each) for each in y])
    assert abs(law.b - 0.6) < 0.02
    assert law.a == pytest.approx(theirs.intercept)
    assert law.b == pytest.approx(-theirs.slope)
    assert law.r2 == pytest.approx(theirs.rvalue**2)
    spread = sum((math.log(x) - sum(map(math.log, STEPS)) / 30) ** 2 for x in STEPS)
    assert law.sigma == pytest.approx(theirs.stderr * spread**0.5)


def test_a_window_leaves_the_rest_out():
    y = [x**-0.5 if x < 200 else 1.0 for x in STEPS]
    assert power_law_fit(STEPS, y, window=(0, 199)).b == pytest.approx(0.5)
    flat = power_law_fit(STEPS, y, window=(201, math.inf))
    assert (flat.b, flat.r2) == (0, 1)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (range(1, 5), range(1, 5), {}, "needs at least 5 points, got 4"),
        (range(1, 9), range(1, 9), dict(window=(3, 6)), "at least 5 points, got 4"),
        (range(1, 7), [1, 2, 3, 0, 5, 6], {}, "of positive numbers"),
        (range(6), range(1, 7), {}, "of positive numbers"),
        (range(1, 7), [1, 2, 3, math.nan, 5, 6], {}, "of positive numbers"),
        ([2] * 6, range(1, 7), {}, "these are all equal"),
        (range(1, 7), range(1, 8), {}, "as many x as y"),
    ],
)
def test_bad_input(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        power_law_fit(list(x), list(y), **options)
