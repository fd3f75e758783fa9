"""Calls of the transport ops: their registration, what has a gradient, what is refused."""

import math
import sys

import pytest
import torch

from stillhouse import ops

DOUBLE = torch.float64


def problem(groups, n, m):
    """Costs in [0, 1] and even marginals, in float32."""
    return torch.rand(groups, n, m), torch.full((groups, n), 1 / n), torch.full((groups, m), 1 / m)


def test_opcheck_and_compile():
    cost, a, b = problem(2, 6, 7)
    numbers = torch.tensor([0.1, math.inf, 0.5, 0.0, -1.0], dtype=DOUBLE)
    arguments = (cost, None, a, b, None, numbers, 3, 0, 0, 0)
    op = torch.ops.stillhouse
    for mode in (-1, 0, 1):
        torch.library.opcheck(op.sinkhorn.default, (*arguments, mode, True))
    value, _, f, g, used, _, history = op.sinkhorn(*arguments, 0, False)
    solved = (torch.ones_like(value), *arguments[:6], f, g, used, history, 3, 0, 0, 0, 0)
    torch.library.opcheck(op.sinkhorn_gradient.default, (*solved, True, False, True))
    x, y = torch.randn(2, 6, 3, requires_grad=True), torch.randn(2, 7, 3, requires_grad=True)
    torch.library.opcheck(op.pairwise_l1.default, (x, y))

    def loss(cost, a, b):
        return ops.sinkhorn(cost, 0.1, a=a, b=b, rho=0.5).value.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for n, m in ((6, 7), (11, 5)):
        cost, a, b = problem(2, n, m)
        given, again = cost.clone().requires_grad_(), cost.clone().requires_grad_()
        want, got = loss(given, a, b), compiled(again, a, b)
        want.backward()
        got.backward()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(again.grad, given.grad, rtol=1e-6, atol=1e-9)


def test_no_second_derivative():
    cost = torch.rand(1, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.sinkhorn(cost, 0.1).value.sum(), cost, create_graph=True)
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        (gradient.square().sum() + cost.sum()).backward()


def test_nothing_is_kept_without_a_gradient():
    """The plan and potentials have no gradient, and no problem is no problem."""
    cost = torch.rand(2, 3, 3, requires_grad=True)
    found = ops.sinkhorn(cost, 0.1)
    assert found.value.requires_grad
    assert not any(each.requires_grad for each in found[1:])
    with torch.no_grad():
        assert not ops.sinkhorn(cost, 0.1).value.requires_grad
    assert ops.sinkhorn(cost, 0.1, return_plan=False).plan is None
    empty = ops.sinkhorn(torch.empty(0, 3, 3, requires_grad=True), 0.1)
    empty.value.sum().backward()
    assert empty.value.shape == (0,)


def test_settings_are_those_of_each_call():
    """Also where equal ones were seen before: in a mode, as a tensor, as another type."""
    cost = torch.rand(2, 3, 3, requires_grad=True)
    for epsilon, mode in ((0.51, torch.inference_mode()), (0.52, torch.no_grad())):
        with mode:
            ops.sinkhorn(cost.detach(), epsilon)
        ops.sinkhorn(cost, epsilon).value.sum().backward()
    torch.func.grad(lambda x: (ops.sinkhorn(cost.detach(), 0.53), x.sum())[1])(torch.ones(2))
    ops.sinkhorn(cost, 0.53).value.sum().backward()
    epsilon = torch.tensor(0.1)
    first = ops.sinkhorn(cost, epsilon).value
    epsilon.fill_(0.5)
    assert not torch.equal(ops.sinkhorn(cost, epsilon).value, first)
    ops.sinkhorn(cost, 0.1, iterations=7)
    with pytest.raises(ValueError, match=r"iterations must be an integer of at least 1, got 7\.0"):
        ops.sinkhorn(cost, 0.1, iterations=7.0)


GOOD = torch.rand(2, 3, 4)
MASS = (torch.full((2, 3), 1 / 3), torch.full((2, 4), 1 / 4))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(cost=-GOOD), ValueError, "costs must not be negative or NaN"),
        (dict(cost=GOOD * torch.nan), ValueError, "costs must not be negative or NaN"),
        (dict(cost=GOOD.long()), TypeError, "cost must be a floating-point tensor"),
        (dict(cost=GOOD[0]), ValueError, r"cost must be \[G, n, m\]"),
        (dict(cost=GOOD[:, :0]), ValueError, "with no size 0"),
        (dict(epsilon=0.0), ValueError, "epsilon must be a positive number"),
        (dict(iterations=0), ValueError, "iterations must be an integer of at least 1"),
        (dict(tolerance=-1.0), ValueError, "tolerance must be a number of at least 0"),
        (dict(a=None, b=None), ValueError, "marginals of ones need n = m, got 3 and 4"),
        (dict(a=-MASS[0]), ValueError, "a must not be negative or NaN"),
        (dict(a=MASS[0] * 0), ValueError, "a of problem 0 has no mass"),
        (dict(b=2 * MASS[1]), ValueError, "masses 1 and 2: they must agree"),
        (dict(a=MASS[1]), ValueError, r"a must be \[2, 3\] or \[3\]"),
        (dict(b=MASS[1].long()), TypeError, "b must be a floating-point tensor"),
        (dict(domain="fast"), ValueError, "domain must be one of auto, kernel, log"),
        (dict(gradient="none"), ValueError, "gradient must be one of"),
        (dict(value="cost"), ValueError, "value must be one of"),
        (dict(gradient="envelope"), ValueError, 'that of value="entropic"'),
        (dict(domain="kernel", epsilon=1e-3), ValueError, "at most 80, got"),
        (dict(rho=0.0), ValueError, "rho must be a positive number"),
        (dict(rho=(1.0, 1.0, 1.0)), ValueError, "a pair"),
        (dict(annealing=1.0), ValueError, r"a factor in \(0, 1\)"),
        (dict(lengths=torch.ones(2)), TypeError, "lengths must be an int64 tensor"),
        (dict(lengths=torch.tensor([[3, 4], [0, 4]])), ValueError, r"in \[1, 3\] and \[1, 4\]"),
        (dict(lengths=torch.tensor([1, 2, 3])), ValueError, r"lengths must be \[2\]"),
    ],
)
def test_bad_input(changes, error, message):
    options = dict(cost=GOOD, epsilon=0.1, a=MASS[0], b=MASS[1]) | changes
    with pytest.raises(error, match=message) as caught:
        ops.sinkhorn(options.pop("cost"), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(y=torch.rand(2, 4, 6)), ValueError, "the same G, d and dtype"),
        (dict(y=torch.rand(2, 4, 5).double()), ValueError, "the same G, d and dtype"),
        (dict(x=torch.rand(3, 5)), ValueError, r"x must be \[G, n, d\]"),
        (dict(cost="l3"), ValueError, "cost must be one of l1, sqeuclidean, euclidean"),
        (dict(debias=True, rho=1.0), ValueError, "does not go with rho"),
    ],
)
def test_bad_points(changes, error, message):
    options = dict(x=torch.rand(2, 4, 5), y=torch.rand(2, 4, 5), epsilon=0.1) | changes
    with pytest.raises(error, match=message):
        ops.sinkhorn_points(options.pop("x"), options.pop("y"), **options)


def test_a_device_without_a_kernel_gets_the_reference(monkeypatch):
    """And is told so; its fields have the same shapes and types."""
    cost, a, b = problem(2, 3, 4)
    want = ops.sinkhorn(cost, 0.1, a=a, b=b)
    monkeypatch.setattr(sys.modules["stillhouse.ops.sinkhorn"], "has_kernel", lambda x: False)
    with pytest.warns(UserWarning, match="no transport kernel for cpu"):
        found = ops.sinkhorn(cost, 0.1, a=a, b=b)
    for got, expected in zip(found, want, strict=True):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    with pytest.warns(UserWarning, match="no distance kernel for cpu"):
        ops.pairwise_l1(cost[0], cost[1])
