"""Entropies of codes of bits against the definition, with every code written out in float64."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse import ops
from stillhouse.ops.bit_entropy import MOST


def rows(*shape, seed=0, scale=0.1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def brute_force(x, beta, gamma, size=1.0):
    """exp(-beta |x - c|^2) over all corners c, normalised."""
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=x.shape[-1]))).to(x) * size
    p = (-beta * (x[:, None] - corners).square().sum(-1)).softmax(-1)
    row = torch.special.entr(p).sum(-1).mean()
    mean = torch.special.entr(p.mean(0)).sum()
    return row - gamma * mean, row, mean


@pytest.mark.parametrize("bits", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("beta", [0.3, 5.0])
def test_by_the_definition(bits, beta):
    x = rows(50, bits)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = ops.lfq_entropy(ours, inv_temperature=beta, diversity=0.7)
    expected = brute_force(plain, beta, 0.7)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    found.loss.backward()
    expected[0].backward()
    torch.testing.assert_close(ours.grad, plain.grad)
    unit = x / x.norm(dim=-1, keepdim=True)
    found = ops.bsq_entropy(7 * x, inv_temperature=beta, diversity=0.7)
    for mine, theirs in zip(found, brute_force(unit, beta, 0.7, bits**-0.5), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5])
def test_groups_are_summed(group):
    x = rows(60, 5)
    found = ops.lfq_entropy(x, inv_temperature=4.0, group=group)
    parts = [brute_force(part, 4.0, 1.0) for part in x.split(group, -1)]
    torch.testing.assert_close(found.mean, sum(part[2] for part in parts))
    torch.testing.assert_close(found.row, sum(part[1] for part in parts))
    assert found.mean >= ops.lfq_entropy(x, inv_temperature=4.0).mean - 1e-12
    sphere = ops.bsq_entropy(x, group=1, inv_temperature=4.0)
    unit = x / x.norm(dim=-1, keepdim=True)
    p = torch.sigmoid(4 * 4.0 / math.sqrt(5) * unit).mean(0)
    by_bit = (torch.special.entr(p) + torch.special.entr(1 - p)).sum()
    torch.testing.assert_close(sphere.mean, by_bit)


def test_in_closed_form():
    """Unsure rows: d log 2 in both; sure rows that use each code once; a single sure row."""
    bits = 10
    found = ops.lfq_entropy(torch.zeros(7, bits))
    torch.testing.assert_close(found.row.item(), bits * math.log(2))
    torch.testing.assert_close(found.mean.item(), bits * math.log(2))
    found = ops.lfq_entropy(ops.lfq_decode(torch.arange(2**bits), bits))
    torch.testing.assert_close(found.mean.item(), bits * math.log(2))
    assert found.row == 0
    found = ops.lfq_entropy(torch.ones(1, bits))
    assert found.mean.abs() < 1e-6
    # Two bits that are always equal: one bit of joint entropy, two bit by bit.
    twins = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    torch.testing.assert_close(ops.lfq_entropy(twins).mean.item(), math.log(2))
    torch.testing.assert_close(ops.lfq_entropy(twins, group=1).mean.item(), 2 * math.log(2))


@pytest.mark.parametrize("sign", [-1, 1])
def test_small_entropies_keep_their_digits(sign):
    """Log-odds of 20, in float32: of large numbers' difference nothing would be left."""
    found = ops.lfq_entropy(torch.tensor([[sign * 20 / 400]])).row
    p = 1 / (1 + math.exp(20))
    expected = -p * math.log(p) - (1 - p) * math.log1p(-p)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("entropy", [ops.lfq_entropy, ops.bsq_entropy])
@pytest.mark.parametrize("group", [None, 2])
def test_gradients(entropy, group):
    x = rows(6, 5, scale=0.5).requires_grad_()
    mask = torch.tensor([True, True, False, True, True, False])
    words = dict(inv_temperature=1.3, group=group, mask=mask, diversity=0.6)
    assert torch.autograd.gradcheck(lambda x: tuple(entropy(x, **words)), x)
    assert torch.autograd.gradgradcheck(lambda x: entropy(x, **words).loss, x)


@pytest.mark.parametrize("entropy", [ops.lfq_entropy, ops.bsq_entropy])
def test_rows_that_do_not_count(entropy):
    x, mask = rows(4, 9, 6), torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) > 0.4
    expected = entropy(x[mask], inv_temperature=2.0)
    x[~mask] = torch.nan
    own = x.clone().requires_grad_()
    found = entropy(own, inv_temperature=2.0, mask=mask)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    found.loss.backward()
    assert not own.grad[~mask].any()
    assert own.grad[mask].any()
    nothing = entropy(x, mask=torch.zeros_like(mask))
    assert nothing.row == 0
    assert nothing.mean == 0
    assert entropy(x[:0]).loss == 0
    for bad in (torch.nan, torch.inf):
        x = rows(4, 6)
        x[2, 3] = bad
        assert all(each.isnan() for each in entropy(x))


@pytest.mark.parametrize("size", [1.0, 30.0, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sure_rows_have_finite_gradients(size, dtype):
    """Most codes of 14 bits have a probability of 0 here, whose logarithm is infinite."""
    x = rows(20, 14, scale=size, dtype=dtype).requires_grad_()
    found = ops.lfq_entropy(x)
    found.loss.backward()
    assert x.grad.isfinite().all()
    assert found.loss.isfinite()


def test_half_precision_is_that_of_the_rounded_rows():
    x = rows(40, 8, dtype=torch.bfloat16)
    expected = ops.lfq_entropy(x.float(), inv_temperature=3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.lfq_entropy(x, inv_temperature=3.0)
    assert found == expected
    exact = ops.lfq_entropy(x.double(), inv_temperature=3.0)
    torch.testing.assert_close(found.mean.double(), exact.mean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("spherical", [False, True])
def test_beside_a_peer(spherical):
    peer = pytest.importorskip("vector_quantize_pytorch")
    theirs = peer.LFQ(codebook_size=2**4, spherical=spherical, diversity_gamma=0.8)
    x = rows(3, 50, 4, scale=0.7, dtype=torch.float32)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    entropy = ops.bsq_entropy if spherical else ops.lfq_entropy
    found = entropy(ours, diversity=0.8, inv_temperature=0.5)
    (_, _, loss), parts = theirs(plain, inv_temperature=0.5, return_loss_breakdown=True)
    torch.testing.assert_close(found.row, parts.per_sample_entropy)
    torch.testing.assert_close(found.mean, parts.batch_entropy)
    torch.testing.assert_close(theirs.entropy_loss_weight * found.loss, loss)
    (theirs.entropy_loss_weight * found.loss).backward()
    loss.backward()
    torch.testing.assert_close(ours.grad, plain.grad)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation makes."""

    found = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(each, torch.Tensor):
                self.found = max(self.found, each.numel())
        return made


def test_no_table_of_rows_by_codes():
    """2^(d/2) a row and 2^d in all, in the backward pass too."""
    bits = 16
    for n in (100, 1000):
        x = rows(n, bits, dtype=torch.float32).requires_grad_()
        saved = 0

        def count(tensor):
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            ops.lfq_entropy(x).loss.backward()
        assert largest.found <= max(n * 2 ** (bits // 2), 2**bits)
        assert saved < 8 * n * 2 ** (bits // 2) + 8 * 2**bits


def test_compiled():
    def loss(x, beta, gamma):
        first = ops.lfq_entropy(x, inv_temperature=beta, diversity=gamma)
        return first.loss + ops.bsq_entropy(x, group=3, inv_temperature=beta).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    for step in range(10):
        beta, gamma = torch.tensor(1.0 + step), torch.tensor(1 / (1 + step))
        gradients = []
        for function in (loss, compiled):
            own = rows(30, 8, seed=step, dtype=torch.float32).requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=True):
                function(own, beta, gamma).backward()
            gradients.append(own.grad)
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


X = rows(5, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.lfq_entropy(rows(3, MOST + 1)),
            ValueError,
            r"has 2\^21 numbers: pass",
        ),
        (lambda: ops.bsq_entropy(X, group=0), ValueError, "group must be from 1 to 20 bits, got 0"),
        (lambda: ops.lfq_entropy(rows(3, 30), group=30), ValueError, "group must be from 1 to 20"),
        (lambda: ops.lfq_entropy(X, inv_temperature=0.0), ValueError, "must be positive, got 0.0"),
        (lambda: ops.lfq_entropy(X, diversity=-1.0), ValueError, "diversity must be 0 or more"),
        (lambda: ops.lfq_entropy(X.long()), TypeError, "x must be a float tensor"),
        (lambda: ops.bsq_entropy(torch.tensor(1.0)), ValueError, "with a bit or more"),
        (lambda: ops.lfq_entropy(X, mask=torch.ones(5)), TypeError, "mask must be bool"),
        (
            lambda: ops.lfq_entropy(X, mask=torch.ones(4, dtype=torch.bool)),
            ValueError,
            "mask must have the rows' shape",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
