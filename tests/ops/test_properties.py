"""Facts that hold for every divergence, and what must not change a result."""

import pytest
import torch

from stillhouse import ops

KINDS = [
    ops.ForwardKL(),
    ops.ReverseKL(),
    ops.JSD(0.3),
    ops.SkewKL(),
    ops.SkewReverseKL(),
    ops.TVD(),
    ops.SymmetricKL(0.3),
    ops.Hellinger(),
    ops.Chi2(),
    ops.LogAcceptance(),
    ops.AlphaBeta(),
    ops.Amari(0.3),
    ops.Renyi(0.6),
    ops.MSELogits("centered"),
    ops.CosineProbs(),
    ops.StandardizedKL(),
    ops.AdaptiveKL(),
]
# Of powers: an equal probability is an equal power but for its rounding.
POWERS = (ops.LogAcceptance, ops.AlphaBeta, ops.Amari, ops.Renyi)


def grad(z, t, kind, **arguments):
    z = z.detach().requires_grad_()
    value = ops.divergence(z, t, kind, **arguments)
    value.sum().backward()
    return value.detach(), z.grad


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_zero_at_equality(kind):
    z = torch.randn(4, 2500) * 5
    value, gradient = grad(z, z.clone(), kind, temperature=1.7)
    rounding = 2e-7 if isinstance(kind, POWERS) else 1e-9
    assert value.abs().max() < rounding
    assert gradient.abs().max() < rounding


@pytest.mark.parametrize("kind", [*KINDS, ops.TAID(0.3)], ids=repr)
def test_gradient_sums_to_zero_and_shifts_do_not_matter(kind):
    z, t = torch.randn(4, 2500, dtype=torch.float64), torch.randn(4, 2500, dtype=torch.float64)
    value, gradient = grad(z, t, kind)
    assert gradient.sum(-1).abs().max() < 1e-13
    shifted, shifted_gradient = grad(z + 100, t - 300, kind)
    torch.testing.assert_close(shifted, value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(shifted_gradient, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("width", [49, 3000])
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_float32_survives_large_offsets(kind, width):
    z, t = torch.randn(2, width) * 3, torch.randn(2, width) * 3
    z, t = (z * 8).round() / 8, (t * 8).round() / 8  # the offset is exact on these
    value, gradient = grad(z, t, kind)
    shifted, shifted_gradient = grad(z + 1024, t - 2048, kind)
    torch.testing.assert_close(shifted, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shifted_gradient, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_columns_may_be_permuted(kind):
    z, t, order = torch.randn(3, 999), torch.randn(3, 999), torch.randperm(999)
    value, gradient = grad(z, t, kind)
    permuted, permuted_gradient = grad(z[:, order], t[:, order], kind)
    torch.testing.assert_close(permuted, value, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(permuted_gradient, gradient[:, order], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    "kind",
    [ops.JSD(), ops.TVD(), ops.SymmetricKL(), ops.Hellinger(), ops.LogAcceptance()],
    ids=repr,
)
def test_symmetric_kinds(kind):
    z, t = torch.randn(3, 999), torch.randn(3, 999)
    torch.testing.assert_close(
        ops.divergence(z, t, kind), ops.divergence(t, z, kind), rtol=2e-6, atol=1e-7
    )


def test_jsd_tends_to_the_kls():
    z, t = torch.randn(3, 99, dtype=torch.float64), torch.randn(3, 99, dtype=torch.float64)
    beta = 1e-7
    torch.testing.assert_close(
        ops.divergence(z, t, ops.JSD(beta)) / beta,
        ops.divergence(z, t, "forward_kl"),
        rtol=1e-4,
        atol=0,
    )
    torch.testing.assert_close(
        ops.divergence(z, t, ops.JSD(1 - beta)) / beta,
        ops.divergence(z, t, "reverse_kl"),
        rtol=1e-4,
        atol=0,
    )


def test_disjoint_supports():
    """Mass where the other side has none: KL is infinite and says so, JSD is ln 2, TVD is 1."""
    z, t = torch.zeros(1, 6), torch.zeros(1, 6)
    z[:, :3], t[:, 3:] = -torch.inf, -torch.inf
    assert ops.divergence(z, t, "forward_kl").item() == torch.inf
    assert ops.divergence(z, t, "reverse_kl").item() == torch.inf
    for kind in (ops.Chi2(), ops.Renyi(2.0), ops.AlphaBeta(0.4, -0.4), ops.AlphaBeta(0.0, 0.0)):
        assert ops.divergence(z, t, kind).item() == torch.inf
    assert ops.divergence(z, t, "log_acceptance").item() == torch.inf
    assert ops.divergence(z, t, "hellinger").item() == pytest.approx(2, abs=1e-6)
    assert ops.divergence(z, t, "jsd").item() == pytest.approx(0.693147, abs=1e-6)
    assert ops.divergence(z, t, "tvd").item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("width", [40, 400, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "kind", [*KINDS, ops.TAID(0.4), ops.MSELogits(), ops.CosineLogits()], ids=repr
)
def test_nan_is_not_hidden(kind, dtype, width, bad):
    """A NaN or infinity on either side makes its row's value and whole gradient NaN, no other's."""
    for side in (0, 1):
        rows = [torch.randn(3, width).to(dtype), torch.randn(3, width).to(dtype)]
        rows[side][1, width - 3] = bad
        value, gradient = grad(*rows, kind)
        assert value.isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().all()
        assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("rows", "width"), [(37, 3001), (3001, 37)])
@pytest.mark.parametrize("kind", [*KINDS, ops.TAID(0.4)], ids=repr)
def test_threads_do_not_change_a_bit(kind, rows, width):
    z, t = torch.randn(rows, width), torch.randn(rows, width)
    threads, results = torch.get_num_threads(), []
    for n in (1, 2):
        torch.set_num_threads(n)
        x = z.clone().requires_grad_()
        loss, stats = ops.divergence_loss(x, t, kind, return_stats=True)
        loss.backward()
        results.append((loss.detach(), x.grad, torch.stack(stats)))
    torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_rows_do_not_depend_on_their_neighbours():
    for width in (49, 3001):
        z, t = torch.randn(75, width), torch.randn(75, width)
        assert torch.equal(ops.divergence(z, t)[4:5], ops.divergence(z[4:5], t[4:5]))


def test_student_below_and_agreement():
    z, t = torch.randn(50, 300, dtype=torch.float64), torch.randn(50, 300, dtype=torch.float64)
    t[:10] = z[:10] + 0.01 * torch.randn(10, 300, dtype=torch.float64)
    _, stats = ops.divergence(z, t, return_stats=True)
    q, p = z.softmax(-1), t.softmax(-1)
    torch.testing.assert_close(stats.student_below, torch.where(q < p, q, 0).sum(-1))
    assert torch.equal(stats.agreement, (q.argmax(-1) == p.argmax(-1)).double())
    tied = torch.tensor([[1.0, 2.0, 2.0]])
    assert (
        ops.divergence(tied, torch.tensor([[1.0, 5.0, 2.0]]), return_stats=True)[1].agreement.item()
        == 1
    )
