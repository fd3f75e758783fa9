"""The plain reference and the kernels against definitions, published values and torch's ops."""

import math

import pytest
import torch
import torch.nn.functional as F

from stillhouse import ops
from stillhouse.ops.divergence_arguments import check_call
from stillhouse.ops.divergence_reference import reference

# The definitions, written from the formulas and not from the package; autograd through them is the
# oracle for gradients.


def probabilities(logits, temperature=1.0):
    return torch.softmax(logits.double() / temperature, -1)


def _plogr(p, r):
    """p log(p / r) with 0 log 0 = 0."""
    return torch.where(
        p > 0, p * (torch.where(p > 0, p, 1).log() - torch.where(p > 0, r, 1).log()), 0
    )


def kl(p, q):
    return _plogr(p, q).sum(-1)


def jsd(p, q, beta=0.5):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def alpha_beta(p, q, a, b):
    s = a + b
    return -(p**a * q**b - a / s * p**s - b / s * q**s).sum(-1) / (a * b)


def taid(z, t, weight, temperature=1.0):
    mixed = (1 - weight) * z.detach().double() + weight * t.double()
    log_q = torch.log_softmax(z.double() / temperature, -1)
    p = torch.softmax(mixed / temperature, -1)
    return -(p * torch.where(p > 0, log_q, 0)).sum(-1)


DEFINITIONS = {
    "forward_kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": jsd,
    "skew_kl": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    "skew_reverse_kl": lambda p, q: kl(q, 0.9 * p + 0.1 * q),
    "tvd": lambda p, q: (p - q).abs().sum(-1) / 2,
    "soft_cross_entropy": lambda p, q: -(p * q.log()).sum(-1),
    "symmetric_kl": lambda p, q: (kl(p, q) + kl(q, p)) / 2,
    "hellinger": lambda p, q: (p.sqrt() - q.sqrt()).square().sum(-1),
    "chi2": lambda p, q: (p**2 / q).sum(-1) - 1,
    "log_acceptance": lambda p, q: -torch.minimum(p, q).sum(-1).log(),
    "alpha_beta": lambda p, q: alpha_beta(p, q, 0.2, 0.7),
    "amari": lambda p, q: ((p * q).sqrt().sum(-1) - 1) / -0.25,
    "renyi": lambda p, q: (p * q).sqrt().sum(-1).log() / -0.5,
}
# No gradient to the teacher.
STUDENT_ONLY = ("soft_cross_entropy", "chi2", "renyi")

P = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
Q = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)

# By hand, of P and Q.
HAND = [
    (ops.ForwardKL(), 0.173287),
    (ops.ReverseKL(), 0.173287),
    (ops.JSD(0.5), 0.042475),
    (ops.JSD(0.1), 0.015483),
    (ops.SkewKL(0.1), 0.138455),
    (ops.SkewReverseKL(0.1), 0.138455),
    (ops.TVD(), 0.25),
    (ops.TAID(0.4), 1.112356),
    (ops.SymmetricKL(0.3), 0.173287),
    (ops.Hellinger(), 0.085786),
    (ops.Chi2(), 0.375),
    (ops.LogAcceptance(), 0.287682),
    (ops.AlphaBeta(0.2, 0.7), 0.190485),
    (ops.Amari(0.5), 0.171573),
    (ops.Renyi(0.5), 0.087681),
    (ops.Renyi(2.0), 0.318454),
    (ops.AdaptiveKL(0.5), 0.173287),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "value"), HAND, ids=lambda x: repr(x))
def test_hand_values(kind, value, dtype):
    got = ops.divergence(Q.log().to(dtype), P.log().to(dtype), kind)
    assert got.dtype == dtype
    assert got.item() == pytest.approx(value, abs=6e-7)


def test_two_class_values():
    p, q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.1, 0.9]).log()
    assert ops.divergence(q, p, "forward_kl").item() == pytest.approx(1.757780, abs=1e-6)
    assert ops.divergence(q, p, "jsd").item() == pytest.approx(0.368064, abs=1e-6)
    assert ops.divergence(q, p, "tvd").item() == pytest.approx(0.8, abs=1e-6)


def test_hand_stats():
    _, stats = ops.divergence(Q.log(), P.log(), return_stats=True)
    entropy = 1.5 * math.log(2)
    expected = [0.75, 0.0, entropy, entropy, 0.0, 0.0, 0.25]
    assert [s.item() for s in stats] == pytest.approx(expected, abs=1e-12)


def test_stats_of_taid_compare_with_its_target():
    z, t = Q.log(), P.log()
    value, stats = ops.divergence(z, t, ops.TAID(0.4), return_stats=True)
    # KL(p_t || q) = cross-entropy - entropy
    assert (value - stats.teacher_entropy).item() == pytest.approx(0.027882, abs=1e-6)
    target = torch.softmax(0.6 * z + 0.4 * t, -1)
    assert stats.teacher_entropy.item() == pytest.approx(
        -(target * target.log()).sum().item(), abs=1e-12
    )
    assert stats.acceptance.item() == pytest.approx(
        torch.minimum(target, Q).sum().item(), abs=1e-12
    )


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_against_the_definitions(name, temperature):
    z = (torch.randn(5, 37, dtype=torch.float64) * 2).requires_grad_()
    t = torch.randn(5, 37, dtype=torch.float64) * 2
    expected = DEFINITIONS[name](probabilities(t, temperature), probabilities(z, temperature))
    (expected_gradient,) = torch.autograd.grad(expected.sum(), z)
    value = ops.divergence(z, t, name, temperature=temperature)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    call = check_call(z, t, name, temperature, None, None, None, 1.0, None, 0.0)
    plain, _ = reference(call, None, False)
    torch.testing.assert_close(plain, expected, rtol=1e-11, atol=1e-13)
    (gradient,) = torch.autograd.grad(plain.sum(), z)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("t", [0.0, 0.37, 1.0])
def test_taid_against_its_definition(t):
    z = (torch.randn(5, 37, dtype=torch.float64) * 2).requires_grad_()
    teacher = torch.randn(5, 37, dtype=torch.float64) * 2
    expected = taid(z, teacher, t, 1.3)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), z)
    value = ops.divergence(z, teacher, ops.TAID(t), temperature=1.3)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


def test_taid_at_zero_has_no_gradient_at_all():
    z = (torch.randn(5, 5003) * 2).requires_grad_()
    ops.divergence(z, torch.randn(5, 5003), ops.TAID(0.0)).sum().backward()
    assert z.grad.eq(0).all()


@pytest.mark.parametrize("name", [n for n in DEFINITIONS if n not in STUDENT_ONLY])
def test_teacher_gradient_by_the_definition(name):
    z = torch.randn(4, 29, dtype=torch.float64).requires_grad_()
    t = torch.randn(4, 29, dtype=torch.float64).requires_grad_()
    arguments = {"temperature": 0.8, "teacher_temperature": 1.7}
    expected = DEFINITIONS[name](probabilities(t, 1.7), probabilities(z, 0.8))
    value = ops.divergence(z, t, name, **arguments)
    upstream = torch.rand(4, dtype=torch.float64)
    for got, want in zip(
        torch.autograd.grad(value, (z, t), upstream),
        torch.autograd.grad(expected, (z, t), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_teacher_gradient_of_a_skewed_jsd_and_of_a_padded_teacher():
    z = torch.randn(4, 29, dtype=torch.float64).requires_grad_()
    t = torch.randn(4, 32, dtype=torch.float64).requires_grad_()
    value = ops.divergence(z, t, ops.JSD(0.2), vocab_size=20)
    expected = DEFINITIONS["jsd"](probabilities(t[:, :20]), probabilities(z[:, :20]), 0.2)
    for got, want in zip(
        torch.autograd.grad(value.sum(), (z, t)),
        torch.autograd.grad(expected.sum(), (z, t)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


LIMITS = [(1.0, 0.0), (0.0, 1.0), (0.0, 0.6), (0.6, 0.0), (0.4, -0.4), (0.0, 0.0), (1.0, 1.0)]


@pytest.mark.parametrize("at", LIMITS, ids=str)
def test_limits_of_alpha_beta_are_continuous(at):
    """What stands at exactly zero is what the general formula tends to on both sides of it."""
    z = torch.randn(4, 29, dtype=torch.float64).requires_grad_()
    t = torch.randn(4, 29, dtype=torch.float64)
    upstream = torch.rand(4, dtype=torch.float64)
    got = ops.divergence(z, t, ops.AlphaBeta(*at))
    (gradient,) = torch.autograd.grad(got, z, upstream)
    h = 1e-5
    near = [
        alpha_beta(t.softmax(-1), z.softmax(-1), at[0] + s * h, at[1] + 2 * s * h) for s in (-1, 1)
    ]
    between = (near[0] + near[1]) / 2  # an error of h^2
    (expected,) = torch.autograd.grad(between, z, upstream)
    torch.testing.assert_close(got, between, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_members_of_alpha_beta():
    z, t = torch.randn(4, 29, dtype=torch.float64), torch.randn(4, 29, dtype=torch.float64)
    p, q = t.softmax(-1), z.softmax(-1)
    squared = (p - q).square().sum(-1) / 2
    logs = (p.log() - q.log()).square().sum(-1) / 2
    for parameters, expected in (
        ((1.0, 0.0), kl(p, q)),
        ((0.0, 1.0), kl(q, p)),
        ((1.0, 1.0), squared),
        ((0.0, 0.0), logs),
        ((0.3, 0.7), ops.divergence(z, t, ops.Amari(0.3))),
    ):
        got = ops.divergence(z, t, ops.AlphaBeta(*parameters))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_taid_has_the_gradient_of_renyi():
    z = torch.randn(4, 301, dtype=torch.float64).requires_grad_()
    t = torch.randn(4, 301, dtype=torch.float64)
    (a,) = torch.autograd.grad(ops.divergence(z, t, ops.TAID(0.4)).sum(), z)
    (b,) = torch.autograd.grad(ops.divergence(z, t, ops.Renyi(0.4)).sum(), z)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_normalised_jsd():
    z, t = torch.randn(3, 99, dtype=torch.float64), torch.randn(3, 99, dtype=torch.float64)
    for beta, smaller in ((0.2, 0.2), (0.7, 0.3)):
        torch.testing.assert_close(
            ops.divergence(z, t, ops.JSD(beta, normalize=True)),
            ops.divergence(z, t, ops.JSD(beta)) / smaller,
        )


OF_LOGITS = {
    ops.MSELogits(): lambda z, t: F.mse_loss(z / 1.3, t / 0.9, reduction="none").mean(-1),
    ops.MSELogits("centered"): lambda z, t: (z / 1.3 - t / 0.9).var(-1, unbiased=False),
    ops.MSELogits("log_probs"): lambda z, t: (
        ((z / 1.3).log_softmax(-1) - (t / 0.9).log_softmax(-1)).square().mean(-1)
    ),
    ops.CosineLogits(): lambda z, t: 1 - F.cosine_similarity(z, t, dim=-1),
    ops.CosineProbs(): lambda z, t: (
        1 - F.cosine_similarity((z / 1.3).softmax(-1), (t / 0.9).softmax(-1), dim=-1)
    ),
    ops.StandardizedKL(): lambda z, t: kl(
        ((t - t.mean(-1, True)) / t.std(-1, keepdim=True) / 0.9).softmax(-1),
        ((z - z.mean(-1, True)) / z.std(-1, keepdim=True) / 1.3).softmax(-1),
    ),
}


@pytest.mark.parametrize("kind", OF_LOGITS, ids=repr)
def test_kinds_with_numbers_of_the_row(kind):
    """Against torch's own functions, with a gradient to the teacher where there is one."""
    z = (torch.randn(5, 37, dtype=torch.float64) + 1).requires_grad_()
    both = differentiable(kind, "teacher")
    t = (torch.randn(5, 37, dtype=torch.float64) - 2).requires_grad_(both)
    expected = OF_LOGITS[kind](z, t)
    value = ops.divergence(z, t, kind, temperature=1.3, teacher_temperature=0.9)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)
    upstream = torch.rand(5, dtype=torch.float64)
    inputs = (z, t) if both else (z,)
    for got, want in zip(
        torch.autograd.grad(value, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def differentiable(kind, side):
    try:
        kind.exchange(0.5, 0.5)
    except ValueError:
        return side == "student"
    return True


EVERY = [
    *(k for k, _ in HAND if not isinstance(k, ops.TAID)),
    ops.SoftCrossEntropy(),
    ops.JSD(0.3, normalize=True),
    *OF_LOGITS,
    *(ops.AlphaBeta(*at) for at in LIMITS),
    ops.DKD(),
    ops.ULD(),
]
# Its weights are constants: test_order.py.
EVERY.remove(ops.AdaptiveKL(0.5))


@pytest.mark.parametrize("at", ["random", "masked", "near", "large"])
@pytest.mark.parametrize("kind", EVERY, ids=repr)
def test_gradients_by_finite_differences(kind, at):
    """At random logits, with a column of -inf on both sides, near p = q, at logits of +-80."""
    z = torch.randn(3, 17, dtype=torch.float64) * 2
    t = torch.randn(3, 17, dtype=torch.float64) * 2
    if at == "masked":
        z[:, 5] = t[:, 5] = -torch.inf
    if at == "near":
        t = z + 1e-2 * torch.randn_like(z)
    if at == "large":
        z[:, 3], t[:, 3], z[:, 4], t[:, 4] = 80, 78, -80, -81
    finite = z[0] > -torch.inf
    inputs = [z[:, finite], t[:, finite].requires_grad_(differentiable(kind, "teacher"))]
    inputs[0].requires_grad_()

    def function(z, t):
        whole = [torch.full((3, 17), -torch.inf, dtype=torch.float64) for _ in range(2)]
        filled = [w.masked_scatter(finite, x) for w, x in zip(whole, (z, t), strict=True)]
        labels = torch.tensor([3, 4, 16]) if kind.needs_labels else None
        return ops.divergence(*filled, kind, temperature=2.5, labels=labels)

    assert torch.autograd.gradcheck(function, inputs, eps=1e-5, atol=1e-6, rtol=1e-6)


def test_softcap_and_scale_gradients_by_finite_differences():
    z = (torch.randn(3, 17, dtype=torch.float64) * 4).requires_grad_()
    t = (torch.randn(3, 17, dtype=torch.float64) * 4).requires_grad_()
    for kind in (ops.ForwardKL(), ops.JSD(0.3)):
        assert torch.autograd.gradcheck(
            lambda z, t, kind=kind: ops.divergence(
                z, t, kind, logit_softcap=(3.0, 5.0), logit_scale=(0.7, 1.4)
            ),
            (z, t),
        )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torch_s(smoothing):
    z = torch.randn(6, 33, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([3, 0, 32, -100, 7, 7])
    expected = F.cross_entropy(z, labels, label_smoothing=smoothing, reduction="none")
    value = ops.divergence(z, None, ops.CrossEntropy(smoothing), labels=labels)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
    (want,) = torch.autograd.grad(expected.sum(), z)
    (got,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    mean = ops.divergence_loss(z, None, ops.CrossEntropy(smoothing), labels=labels)
    torch.testing.assert_close(mean, F.cross_entropy(z, labels, label_smoothing=smoothing))


def test_cross_entropy_has_the_student_s_stats_alone():
    z = torch.randn(4, 2311).requires_grad_()
    labels = torch.tensor([3, 0, -100, 7])
    for form in (ops.divergence, ops.divergence_loss):
        _, stats = form(z, None, "cross_entropy", labels=labels, return_stats=True)
        counted = labels != -100
        entropy = torch.distributions.Categorical(logits=z.detach()).entropy()
        torch.testing.assert_close(stats.student_entropy[counted], entropy[counted])
        torch.testing.assert_close(stats.student_lse[counted], z.detach().logsumexp(-1)[counted])
        for name in ("acceptance", "agreement", "teacher_entropy", "teacher_lse", "student_below"):
            assert getattr(stats, name)[counted].isnan().all()
        assert torch.stack(stats)[:, ~counted].eq(0).all()


def test_forward_kl_is_torch_s():
    z, t = torch.randn(6, 1000), torch.randn(6, 1000)
    expected = F.kl_div(
        z.double().log_softmax(-1), t.double().log_softmax(-1), log_target=True, reduction="none"
    )
    torch.testing.assert_close(
        ops.divergence(z, t).double(), expected.sum(-1), rtol=2e-6, atol=1e-7
    )


def test_a_tiny_kl_is_right():
    """KL of about 5e-7 between rows of 131,072 columns: one part in a thousand."""
    z = torch.randn(4, 131_072) * 3
    t = z + 1e-3 * torch.randn_like(z)
    for kind, definition in (
        ("forward_kl", "forward_kl"),
        ("reverse_kl", "reverse_kl"),
        ("jsd", "jsd"),
    ):
        expected = DEFINITIONS[definition](probabilities(t), probabilities(z))
        assert (expected < 1e-6).all()
        for level in range(ops.cpu_level() + 1):
            best = ops.cpu_level()
            ops.cpu_level(level)
            value = ops.divergence(z, t, kind).double()
            ops.cpu_level(best)
            assert ((value - expected).abs() / expected).max() < 1e-3
