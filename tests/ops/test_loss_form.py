"""The loss form: weights, reductions, label mix, and every way in which an in-place gradient could
lie to its user."""

import pytest
import torch
import torch.nn.functional as F

from stillhouse import ops

KINDS = [ops.ForwardKL(), ops.ReverseKL(), ops.JSD(0.3), ops.TVD(), ops.TAID(0.4), ops.SkewKL()]

pytestmark = pytest.mark.usefixtures("kernels")


def plain(z, t, kind, weight, denominator=None, labels=None, label_weight=0.0, **arguments):
    """The loss from the per-row op and torch, with autograd doing the rest."""
    per_row = ops.divergence(z, t, kind, **arguments)
    if labels is not None:
        ce = F.cross_entropy(z.double(), labels, reduction="none", ignore_index=-100)
        per_row = (1 - label_weight) * per_row + label_weight * ce
    return (weight * per_row).sum() / (weight.sum() if denominator is None else denominator)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("label_weight", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_against_the_per_row_form(kind, temperature, label_weight, inplace):
    leaf = (torch.randn(6, 2311, dtype=torch.float64) * 2).requires_grad_()
    t = torch.randn(6, 2311, dtype=torch.float64) * 2
    labels = torch.tensor([5, 2310, -100, 0, 77, 2047])
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    mix = {"labels": labels, "label_weight": label_weight} if label_weight else {}
    for denominator in (None, 11.0, torch.tensor(11.0)):
        expected = plain(leaf, t, kind, weight, denominator, temperature=temperature, **mix)
        (want,) = torch.autograd.grad(expected, leaf)
        loss = ops.divergence_loss(
            leaf * 1,
            t,
            kind,
            weight=weight,
            denominator=denominator,
            temperature=temperature,
            inplace_grad=inplace,
            **mix,
        )
        (got,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_label_mix_in_low_precision(dtype, softcap):
    leaf = (torch.randn(4, 507) * 2).to(dtype).requires_grad_()
    t = (torch.randn(4, 507) * 2).to(dtype)
    labels = torch.tensor([1, 2, 3, 506])
    exact = leaf.detach().double().requires_grad_()
    capped = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    expected = (
        0.6 * ops.divergence(exact, t.double(), logit_softcap=softcap, temperature=2.0).mean()
    )
    expected = expected + 0.4 * F.cross_entropy(capped, labels)
    expected.backward()
    for inplace in (False, True):
        leaf.grad = None
        loss = ops.divergence_loss(
            leaf * 1,
            t,
            temperature=2.0,
            labels=labels,
            label_weight=0.4,
            logit_softcap=softcap,
            inplace_grad=inplace,
        )
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
        error = (leaf.grad.double() - exact.grad).abs().amax()
        assert error < rounding * exact.grad.abs().amax()


def test_sum_and_upstream_scale():
    leaf = torch.randn(5, 300, dtype=torch.float64).requires_grad_()
    t = torch.randn(5, 300, dtype=torch.float64)
    (want,) = torch.autograd.grad(2.5 * ops.divergence(leaf, t).sum(), leaf)
    for inplace in (False, True):
        loss = ops.divergence_loss(leaf * 1, t, reduction="sum", inplace_grad=inplace)
        (got,) = torch.autograd.grad(2.5 * loss, leaf)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scale_rounds_once_and_keeps_a_unit_untouched(dtype):
    gradient = torch.randn(7, 3001).to(dtype)
    same, scaled = gradient.clone(), gradient.clone()
    torch.ops.stillhouse.scale_(same, torch.tensor(1.0))
    torch.ops.stillhouse.scale_(scaled, torch.tensor(0.3))
    assert torch.equal(same, gradient)
    assert torch.equal(scaled, (gradient.float() * torch.tensor(0.3)).to(dtype))


def test_masked_and_weightless_rows_are_not_read():
    z, t = torch.randn(4, 300), torch.randn(4, 300)
    z[1], t[1], z[2], t[2] = torch.nan, torch.nan, torch.nan, torch.nan
    leaf = z.requires_grad_()
    mask = torch.tensor([True, False, True, True])
    weight = torch.tensor([1.0, 1.0, 0.0, 2.0])
    for _inplace in (False, True):
        leaf.grad = None
        loss = ops.divergence_loss(
            leaf.view(4, 300), t, mask=mask, weight=weight, inplace_grad=False
        )
        loss.backward()
        rows = ops.divergence(leaf.detach(), t)
        assert loss.item() == pytest.approx(((rows[0] + 2 * rows[3]) / 3).item(), rel=1e-6)
        assert leaf.grad[1:3].eq(0).all()
        assert leaf.grad.isfinite().all()


def test_no_row_counts():
    leaf = torch.randn(4, 300).requires_grad_()
    loss = ops.divergence_loss(leaf * 1, torch.randn(4, 300), mask=torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert leaf.grad.eq(0).all()
    empty = torch.randn(0, 300).requires_grad_()
    loss = ops.divergence_loss(empty * 1, torch.randn(0, 300))
    loss.backward()
    assert loss.item() == 0


def test_stats_come_with_the_loss():
    z, t = torch.randn(4, 3001).requires_grad_(), torch.randn(4, 3001)
    _, want = ops.divergence(z, t, return_stats=True)
    for inplace in (False, True):
        _, got = ops.divergence_loss(z * 1, t, return_stats=True, inplace_grad=inplace)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
            assert not a.requires_grad


# --- in-place gradients ---------------------------------------------------------------------------


def make(rows=4, width=300):
    leaf = torch.randn(rows, width).requires_grad_()
    return leaf, torch.randn(rows, width)


def test_the_gradient_takes_the_logits_place():
    leaf, t = make()
    z = leaf * 1
    ops.divergence_loss(z, t, inplace_grad=True).backward()
    assert torch.equal(leaf.grad, z.detach())


def test_a_softcap_before_raises_instead_of_lying():
    leaf, t = make()
    z = 3 * torch.tanh(leaf / 3)  # tanh saved its result; `3 *` did not
    ops.divergence_loss(z, t, inplace_grad=True).backward()  # the product's memory is free to take
    capped = torch.tanh(leaf)
    loss = ops.divergence_loss(capped, t, inplace_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_logsumexp_before_raises_instead_of_lying():
    leaf, t = make()
    z = leaf * 1
    penalty = z.logsumexp(-1).square().mean()
    loss = ops.divergence_loss(z, t, inplace_grad=True) + 1e-4 * penalty
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_later_write_to_the_logits_raises():
    leaf, t = make()
    z = leaf * 1
    loss = ops.divergence_loss(z, t, inplace_grad=True)
    z.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_leaf_raises():
    leaf, t = make()
    with pytest.raises(ValueError, match="leaf"):
        ops.divergence_loss(leaf, t, inplace_grad=True)


def test_shared_storage_raises():
    leaf, _ = make()
    z = leaf * 1
    with pytest.raises(ValueError, match="share memory"):
        ops.divergence_loss(z, z.detach(), inplace_grad=True)
    both = torch.randn(8, 300).requires_grad_() * 1
    with pytest.raises(ValueError, match="share memory"):
        ops.divergence_loss(both[:4], both[4:].detach(), inplace_grad=True)


def test_an_expanded_view_raises():
    leaf = torch.randn(1, 300).requires_grad_()
    with pytest.raises(ValueError, match="expanded"):
        ops.divergence_loss(leaf.expand(4, 300), torch.randn(4, 300), inplace_grad=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_backward_raises(inplace):
    leaf, t = make()
    loss = ops.divergence_loss(leaf * 1, t, inplace_grad=inplace)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_with_gradients_off_the_logits_stay():
    leaf, t = make()
    want = ops.divergence_loss(leaf * 1, t)
    with torch.no_grad():
        z = leaf * 1
        before = z.clone()
        loss = ops.divergence_loss(z, t, inplace_grad=True)
    assert torch.equal(z, before)
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    z = leaf.detach() * 1
    ops.divergence_loss(z, t, inplace_grad=True)
    assert torch.equal(z, leaf)


def test_rows_of_a_strided_view_keep_their_neighbours():
    leaf = torch.randn(3, 5, 40).requires_grad_()
    t = torch.randn(3, 4, 40)
    base = leaf * 1
    kept = base[:, -1].clone()
    ops.divergence_loss(base[:, :-1], t, inplace_grad=True).backward()
    (want,) = torch.autograd.grad(ops.divergence(leaf[:, :-1], t).mean(), leaf)
    torch.testing.assert_close(leaf.grad, want, rtol=1e-5, atol=1e-8)
    assert torch.equal(base[:, -1], kept)


def test_no_tensor_of_the_logits_size_is_allocated():
    leaf, t = torch.randn(64, 49_152).requires_grad_(), torch.randn(64, 49_152)
    z = leaf.view(64, 49_152)
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(ops.divergence_loss(z, t, inplace_grad=True), leaf)
    usage = "cpu_memory_usage" if leaf.is_cpu else "device_memory_usage"
    largest = max(abs(getattr(event, usage)) for event in profile.events())
    assert largest < 64 * 1024
