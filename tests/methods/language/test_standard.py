import doctest
import inspect

import pytest
import torch

from stillhouse.methods.language import standard

ROWS, COLUMNS = 6, 11


def logits(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(ROWS, COLUMNS, generator=generator, dtype=dtype)


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def adaptive(p, q, mu):
    """Row by row, as the paper says it: the head is the largest columns up to the mass mu."""
    result = []
    for p_row, q_row in zip(p, q, strict=True):
        order = p_row.argsort(descending=True)
        head = order[: max(1, int((p_row[order].cumsum(0) <= mu).sum()))]
        gap = (p_row - q_row).abs()
        w = gap[head].sum() / gap.sum()
        result.append(w * kl(p_row, q_row) + (1 - w) * kl(q_row, p_row))
    return torch.stack(result)


def decoupled(p, q, labels, alpha, beta):
    target = torch.nn.functional.one_hot(labels, COLUMNS).bool()
    pair_p, pair_q = (torch.stack([x[target], x[~target].view(ROWS, -1).sum(1)], 1) for x in (p, q))
    rest_p, rest_q = (x[~target].view(ROWS, -1) for x in (p, q))
    rest_p, rest_q = (x / x.sum(1, keepdim=True) for x in (rest_p, rest_q))
    return alpha * kl(pair_p, pair_q) + beta * kl(rest_p, rest_q)


def alpha_beta(p, q, a, b):
    s = a + b
    return -(p**a * q**b - a / s * p**s - b / s * q**s).sum(-1) / (a * b)


def standardised(z, t):
    z, t = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) / 2 for x in (z, t))
    return 4 * kl(t.softmax(-1), z.softmax(-1))


LABELS = torch.tensor([3, 0, 10, 5, 5, 1])
CASES = {
    "gkd": (standard.gkd_loss, {}, lambda z, t: jsd(t.softmax(-1), z.softmax(-1), 0.5)),
    "gkd 0.1": (
        standard.gkd_loss,
        dict(beta=0.1, temperature=2.0),
        lambda z, t: jsd((t / 2).softmax(-1), (z / 2).softmax(-1), 0.1),
    ),
    "gkd 0": (standard.gkd_loss, dict(beta=0), lambda z, t: kl(t.softmax(-1), z.softmax(-1))),
    "gkd 1": (standard.gkd_loss, dict(beta=1), lambda z, t: kl(z.softmax(-1), t.softmax(-1))),
    "distillm": (
        standard.distillm_loss,
        {},
        lambda z, t: kl(z.softmax(-1), 0.9 * t.softmax(-1) + 0.1 * z.softmax(-1)),
    ),
    "distillm, forward": (
        standard.distillm_loss,
        dict(reverse=False, alpha=0.3),
        lambda z, t: kl(t.softmax(-1), 0.3 * t.softmax(-1) + 0.7 * z.softmax(-1)),
    ),
    "minillm": (
        standard.minillm_token_loss,
        {},
        lambda z, t: kl(z.softmax(-1), t.softmax(-1)),
    ),
    "abkd": (
        standard.abkd_loss,
        {},
        lambda z, t: alpha_beta(t.softmax(-1), z.softmax(-1), 0.2, 0.7),
    ),
    "akl": (standard.akl_loss, {}, lambda z, t: adaptive(t.softmax(-1), z.softmax(-1), 0.5)),
    "dkd": (
        standard.dkd_loss,
        dict(labels=LABELS),
        lambda z, t: 16 * decoupled((t / 4).softmax(-1), (z / 4).softmax(-1), LABELS, 1, 8),
    ),
    "uld": (
        standard.uld_loss,
        {},
        lambda z, t: (z.softmax(-1).sort(1)[0] - t.softmax(-1).sort(1)[0]).abs().sum(-1),
    ),
    "standardised": (standard.standardized_kl_loss, {}, standardised),
}


@pytest.mark.parametrize("name", CASES)
def test_the_papers_formula_in_float64(name):
    loss, options, formula = CASES[name]
    student, teacher = logits(0), logits(1)
    mask = torch.tensor([True, True, False, True, True, False])
    own = student.clone().requires_grad_()
    expected = formula(own, teacher)[mask].mean()
    (gradient,) = torch.autograd.grad(expected, own)
    given = student.clone().requires_grad_()
    value = loss(given, teacher, mask=mask, **options)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    value.backward()
    if name != "akl":  # whose weight is a constant for the gradient, not in this formula
        torch.testing.assert_close(given.grad, gradient, rtol=1e-7, atol=1e-9)
    assert not given.grad[~mask].any()
    assert loss(student, teacher, mask=mask.new_zeros(ROWS), **options).item() == 0
    single = loss(student.float(), teacher.float(), mask=mask, **options)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected.item(), rel=1e-4)


def test_uld_of_two_vocabularies():
    student, teacher = logits(0), logits(1)[:, :7]
    q, p = student.softmax(-1).sort(1, descending=True)[0], torch.zeros(ROWS, COLUMNS).double()
    p[:, :7] = teacher.softmax(-1).sort(1, descending=True)[0]
    expected = (q - p).abs().sum(1).mean().item()
    assert standard.uld_loss(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def says(number):
    return lambda ids: 50 * torch.nn.functional.one_hot(torch.full_like(ids, number), 10).float()


def test_sources():
    prompts, answers = [[1], [2]], [[5], [6]]
    options = dict(max_new_tokens=1, eos_token_id=(), seed=1)
    source = standard.gkd_source(prompts, answers, says(9), **options)
    drawn = [int((source.batch(2).ids[:, 1] == 9).all()) for _ in range(100)]
    assert 30 < sum(drawn) < 70
    source, schedule = standard.distillm_source(prompts, answers, says(9), **options)
    assert not any((source.batch(2).ids == 9).any() for _ in range(20))
    for loss in range(11):
        schedule.evaluated(float(loss))
    assert source.share == pytest.approx(1.0)
    assert all((source.batch(2).ids[:, 1] == 9).all() for _ in range(5))
    schedule.update({}, 3, 4)
    assert source.replay.share == 0.75
    assert source.replay.capacity == 1000


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (standard.gkd_loss, dict(beta=1.5), "JSD.beta must lie in"),
        (standard.distillm_loss, dict(alpha=0.0), "SkewReverseKL.alpha must lie in"),
        (standard.akl_loss, dict(mu=2.0), "AdaptiveKL.mu must lie in"),
        (standard.gkd_loss, dict(mask=torch.ones(2, dtype=torch.bool)), "mask"),
    ],
)
def test_what_they_refuse(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(logits(0), logits(1), **options)


def test_examples_and_docstrings():
    outcome = doctest.testmod(standard)
    assert outcome.attempted
    assert not outcome.failed
    for name, function in vars(standard).items():
        if name.endswith(("_loss", "_source")):
            assert "arXiv" in inspect.getdoc(function) or "GKD" in inspect.getdoc(function)
