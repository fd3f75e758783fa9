"""Kinds that depend on an order of columns, against sorting in float64."""

import pytest
import torch
import torch.nn.functional as F

from stillhouse import ops

# --- the head of adaptive_kl ----------------------------------------------------------------------


def head_by_sorting(p, mu):
    """The longest prefix of the descending order (ties by column) with a sum of at most mu."""
    order = sorted(range(len(p)), key=lambda j: (-p[j], j))
    head, total = order[:1], p[order[0]]
    for j in order[1:]:
        total += p[j]
        if total > mu:
            break
        head.append(j)
    return head


def adaptive_weight(z, t, mu):
    """Of the reverse KL, one a row."""
    weights = []
    for q, p in zip(z.double().softmax(-1), t.double().softmax(-1), strict=True):
        gap = (p - q).abs()
        in_head = gap[head_by_sorting(p.tolist(), mu)].sum()
        weights.append(1 - in_head / gap.sum())
    return torch.stack(weights)


def check_adaptive(z, t, mu, rtol=1e-9):
    """Value and gradient are those of the two KLs at the row's weight, which is a constant."""
    weight = adaptive_weight(z, t, mu)
    z = z.requires_grad_()
    parts = [ops.divergence(z, t, name) for name in ("forward_kl", "reverse_kl")]
    expected = (1 - weight).to(z.dtype) * parts[0] + weight.to(z.dtype) * parts[1]
    value = ops.divergence(z, t, ops.AdaptiveKL(mu))
    torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-12)
    (want,) = torch.autograd.grad(expected.sum(), z)
    (got,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * want.abs().max().item())


@pytest.mark.parametrize("mu", [0.02, 0.5, 0.97])
@pytest.mark.parametrize("width", [3, 49, 1000, 5003])
def test_adaptive_weights(width, mu, level):
    for scale in (0.3, 3.0):
        check_adaptive(
            torch.randn(4, width, dtype=torch.float64) * scale,
            torch.randn(4, width, dtype=torch.float64) * scale,
            mu,
        )


def test_adaptive_weights_near_equality_and_at_large_logits(level):
    z = torch.randn(3, 301, dtype=torch.float64)
    check_adaptive(z.clone(), z + 1e-4 * torch.randn_like(z), 0.5, rtol=1e-6)
    t = torch.randn(3, 301, dtype=torch.float64)
    z[:, 3], t[:, 3], z[:, 4], t[:, 4] = 80, 78, -80, -81
    check_adaptive(z, t, 0.5)


@pytest.mark.parametrize("values", [1, 2, 5, 40])
def test_ties_go_to_the_lower_column(values, level):
    """A teacher of few distinct logits, of one at the limit: the border falls among equal ones."""
    for width in (50, 2311):
        t = torch.randint(0, values, (4, width)).double() / 8
        z = torch.randn(4, width, dtype=torch.float64)
        for mu in (0.203, 0.711):
            check_adaptive(z.clone(), t, mu)


def test_a_zero_with_a_sign_is_a_tie(level):
    t = torch.where(torch.rand(3, 301) < 0.5, 0.0, -0.0).double()
    check_adaptive(torch.randn(3, 301, dtype=torch.float64), t, 0.3)


def test_a_mass_of_everything(level):
    """A tensor's value is not checked: all columns of mass are in the head, no other is read."""
    z, t = torch.randn(3, 77), torch.randn(3, 77)
    t[:, 70:] = z[:, 70:] = -torch.inf
    forward, reverse = (ops.divergence(z, t, name) for name in ("forward_kl", "reverse_kl"))
    got = ops.divergence(z, t, ops.AdaptiveKL(torch.tensor(1.0)))  # but for what rounds beyond 1
    assert (got >= torch.minimum(forward, reverse) * 0.999).all()
    assert (got <= torch.maximum(forward, reverse) * 1.001).all()


def test_ties_of_bfloat16(level):
    z, t = torch.randn(4, 3001).bfloat16(), torch.randn(4, 3001).bfloat16()
    check_adaptive(z.float(), t.float(), 0.4, rtol=1e-5)
    as_they_are = ops.divergence(z, t, ops.AdaptiveKL(0.4))
    torch.testing.assert_close(
        as_they_are, ops.divergence(z.float(), t.float(), ops.AdaptiveKL(0.4)), rtol=1e-5, atol=0
    )


def test_a_teacher_of_some_columns(level):
    """-inf columns: the border may lie below all that is left."""
    z, t = torch.randn(3, 700, dtype=torch.float64), torch.randn(3, 700, dtype=torch.float64)
    hidden = torch.rand(700) < 0.98
    z[:, hidden], t[:, hidden] = -torch.inf, -torch.inf
    check_adaptive(z, t, 0.9)


# --- uld ------------------------------------------------------------------------------------------


def uld(z, t):
    """As the paper writes it: sort both, pad the shorter, sum the gaps."""
    q, p = (x.softmax(-1).sort(dim=-1, descending=True, stable=True).values for x in (z, t))
    width = max(q.shape[-1], p.shape[-1])
    return (F.pad(q, (0, width - q.shape[-1])) - F.pad(p, (0, width - p.shape[-1]))).abs().sum(-1)


def check_uld(z, t):
    z, t = z.double().requires_grad_(), t.double().requires_grad_()
    upstream = torch.rand(z.shape[:-1], dtype=torch.float64)
    expected, value = uld(z, t), ops.divergence(z, t, "uld")
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)
    for got, want in zip(
        torch.autograd.grad(value, (z, t), upstream),
        torch.autograd.grad(expected, (z, t), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_uld_by_hand():
    q, p = torch.tensor([0.3, 0.5, 0.2]), torch.tensor([0.1, 0.9])
    assert ops.divergence(q.log(), p.log(), "uld").item() == pytest.approx(0.8, abs=1e-6)
    # The same numbers in another order are the same multiset.
    assert ops.divergence(q.log(), q[[2, 0, 1]].log(), "uld").item() == pytest.approx(0, abs=3e-7)


@pytest.mark.parametrize(
    "widths", [(1, 3), (7, 7), (49, 130), (700, 301), (3001, 5003), (9001, 12000)], ids=str
)
def test_uld_by_its_definition(widths, level):
    for scale in (0.3, 3.0):
        check_uld(torch.randn(4, widths[0]) * scale, torch.randn(4, widths[1]) * scale)


@pytest.mark.parametrize("gap", [1e-9, 1e-6, 1e-3])
def test_uld_of_rows_that_are_nearly_the_same(gap, level):
    """Ranks of both sides meet everywhere: all of the row is sorted."""
    z = torch.randn(3, 2001, dtype=torch.float64)
    check_uld(z, z[:, torch.randperm(2001)] + gap * torch.randn(3, 2001, dtype=torch.float64))


def test_uld_is_exactly_zero_where_the_rows_agree(level):
    z = (torch.randn(3, 2001) * 3).requires_grad_()
    value = ops.divergence(z, z.detach()[:, torch.randperm(2001)], "uld")
    assert value.abs().max() < 5e-7  # in another order, sums round differently
    value = ops.divergence(z, z.detach(), "uld")
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.eq(0).all()
    assert gradient.eq(0).all()


@pytest.mark.parametrize("values", [1, 3, 20])
def test_uld_with_ties(values, level):
    """Rows of few distinct logits, of one at the limit: equal columns have ranks by their place."""
    for widths in ((50, 50), (2311, 1200), (700, 2400)):
        z = torch.randint(0, values, (3, widths[0])).double() / 4
        t = torch.randint(0, values, (3, widths[1])).double() / 4
        check_uld(z, t)


def test_uld_with_columns_of_no_mass(level):
    z, t = torch.randn(3, 700), torch.randn(3, 500)
    z[:, 100:], t[:, 300:] = -torch.inf, -torch.inf
    z[0, 5], t[1, 7] = 120, 90  # and some that underflow
    z[2, :50] = -3000
    z, t = z.double().requires_grad_(), t.double()
    value, expected = ops.divergence(z, t, "uld"), uld(z, t)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)
    (got,) = torch.autograd.grad(value.sum(), z)
    (want,) = torch.autograd.grad(expected.sum(), z)
    torch.testing.assert_close(got, want.nan_to_num(0), rtol=1e-9, atol=1e-12)


def test_uld_is_the_wasserstein_distance_of_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    z, t = torch.randn(90, dtype=torch.float64), torch.randn(90, dtype=torch.float64)
    distance = stats.wasserstein_distance(z.softmax(-1).numpy(), t.softmax(-1).numpy())
    assert ops.divergence(z, t, "uld").item() == pytest.approx(90 * distance, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_uld_with_a_label_term(dtype, level):
    leaf = (torch.randn(4, 2311) * 2).to(dtype).requires_grad_()
    t = (torch.randn(4, 3000) * 2).to(dtype)
    labels = torch.tensor([1, 2310, -100, 700])
    exact = leaf.detach().double().requires_grad_()
    capped, teacher = 5 * torch.tanh(exact / 5), 5 * torch.tanh(t.double() / 5)
    expected = 0.6 * uld(capped / 2, teacher / 2).mean()
    expected = expected + 0.4 * F.cross_entropy(capped, labels, reduction="sum") / 4
    (want,) = torch.autograd.grad(expected, exact)
    loss = ops.divergence_loss(
        leaf * 1,
        t,
        "uld",
        temperature=2.0,
        logit_softcap=5.0,
        labels=labels,
        label_weight=0.4,
        inplace_grad=True,
    )
    (got,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    rounding = {torch.float32: 3e-6, torch.bfloat16: 4e-3}[dtype]
    # A sign that hangs on a last place moves a column by twice its share.
    flipped = (got.double() - want).abs() > rounding * want.abs().max()
    assert flipped.sum() <= 2


def test_uld_has_no_statistics_of_pairs(level):
    z, t = torch.randn(3, 300), torch.randn(3, 200)
    _, stats = ops.divergence(z, t, "uld", return_stats=True)
    for name in ("acceptance", "agreement", "student_below"):
        assert getattr(stats, name).isnan().all()
    torch.testing.assert_close(
        stats.teacher_entropy, torch.distributions.Categorical(logits=t).entropy()
    )
    torch.testing.assert_close(stats.student_lse, z.logsumexp(-1))
