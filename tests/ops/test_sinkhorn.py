"""Entropic transport: closed forms, the plain torch reference in float64, POT."""

import subprocess
import sys

import pytest
import torch

from stillhouse import ops
from stillhouse.ops import sinkhorn_reference
from stillhouse.ops.sinkhorn_autograd import DOMAINS, GRADIENTS, GROUNDS, VALUES

DOUBLE = torch.float64


@pytest.fixture
def plain(monkeypatch):
    """plain(function): what it returns when the reference stands in the kernel's place."""
    module = sys.modules["stillhouse.ops.sinkhorn"]

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(module, "has_kernel", lambda x: False)
            patch.setattr(module.divergence_autograd, "warn_without_kernel", lambda *_: None)
            return function()

    return run


def problem(groups, n, m, dtype=DOUBLE, zeros=False, seed=0):
    """Costs in [0, 1] and marginals of mass 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        x = torch.rand(shape, generator=generator, dtype=DOUBLE, device="cpu")
        return x.to(torch.get_default_device())

    cost = draw(groups, n, m)
    a, b = (draw(groups, k) + 0.1 for k in (n, m))
    if zeros and min(n, m) > 2:
        a[0, 1] = b[0, 2] = b[-1, 0] = 0
    a, b = (x / x.sum(-1, keepdim=True) for x in (a, b))
    return cost.to(dtype), a.to(dtype), b.to(dtype)


def with_gradients(cost, a, b, upstream, **options):
    """A `Transport` and the gradients of sum upstream * value."""
    given = [None if x is None else x.clone().requires_grad_() for x in (cost, a, b)]
    epsilon = options.pop("epsilon")
    found = ops.sinkhorn(given[0], epsilon, a=given[1], b=given[2], **options)
    (found.value * upstream).sum().backward()
    return found, [None if x is None else x.grad for x in given]


def assert_same(found, want, label="", rtol=1e-9, atol=1e-10):
    torch.testing.assert_close(
        found.double(), want.double(), rtol=rtol, atol=atol, equal_nan=True, msg=label or None
    )


# ---- closed forms


def test_two_by_two(level):
    """P = k / (1 + k) on the diagonal, k = e^((C01 + C10 - C00 - C11) / 2 epsilon)."""
    cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[0.2, 0.6], [0.5, 0.1]]])
    for domain in DOMAINS:
        found = ops.sinkhorn(cost, 0.1, domain=domain)
        k = ((cost[:, 0, 1] + cost[:, 1, 0] - cost[:, 0, 0] - cost[:, 1, 1]) / 0.2).double().exp()
        diagonal = k / (1 + k)
        assert_same(found.plan[:, 0, 0], diagonal, rtol=1e-6, atol=0)
        assert_same(found.plan[:, 0, 1], 1 / (1 + k), rtol=2e-5, atol=0)
        assert_same(found.value, torch.tensor([9.07957e-5, 0.3143890]), rtol=2e-5, atol=0)
        assert_same(found.plan.sum(1), torch.ones(2, 2), rtol=0, atol=2e-7)
        # The plan is that of the potentials.
        outer = found.f[:, :, None] + found.g[:, None]
        assert_same(((outer - cost) / 0.1).exp(), found.plan, rtol=1e-5, atol=1e-9)


def test_one_sample_and_a_large_epsilon(level):
    one = ops.sinkhorn(torch.full((3, 1, 1), 0.7), 0.1)
    assert_same(one.value, torch.full((3,), 0.7), rtol=1e-6)
    assert_same(one.plan, torch.ones(3, 1, 1), rtol=1e-6)
    cost, _, _ = problem(2, 6, 6)
    even = ops.sinkhorn(cost, 1e7)
    assert_same(even.plan, torch.full((2, 6, 6), 1 / 6), rtol=1e-6)


def test_sinkd_is_divisions_by_row_and_column_sums():
    """The official form: rows, then columns, of K itself."""
    cost, _, _ = problem(4, 9, 9)
    plan = (-cost / 0.1).exp()
    for _ in range(20):
        plan = plan / plan.sum(2, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    found = ops.sinkhorn(cost, 0.1)
    assert_same(found.plan, plan, rtol=1e-12, atol=1e-15)
    assert_same(found.value, (plan * cost).sum((1, 2)), rtol=1e-12)
    assert_same(found.marginal_error, (plan.sum(2) - 1).abs().amax(-1), rtol=1e-6, atol=1e-12)


def test_permutations_and_shifts(level):
    cost, a, b = problem(2, 40, 33, torch.float32)
    rows, columns = torch.randperm(40), torch.randperm(33)
    first = ops.sinkhorn(cost, 0.1, a=a, b=b)
    moved = ops.sinkhorn(cost[:, rows][:, :, columns], 0.1, a=a[:, rows], b=b[:, columns])
    assert_same(moved.plan, first.plan[:, rows][:, :, columns], rtol=1e-4, atol=1e-9)
    assert_same(moved.value, first.value, rtol=1e-5)
    shifted = ops.sinkhorn(cost + 3, 0.1, a=a, b=b)
    assert_same(shifted.plan, first.plan, rtol=2e-4, atol=1e-8)
    assert_same(shifted.value, first.value + 3, rtol=1e-5)


# ---- the reference, which autograd differentiates

CASES = {
    "balanced": dict(),
    "unbalanced": dict(rho=0.7),
    "unbalanced on one side": dict(rho=(None, 0.5), value="entropic"),
    "annealed": dict(annealing=0.7),
    "annealed and unbalanced": dict(annealing=0.5, rho=0.4, value="entropic"),
    "stopped": dict(tolerance=1e-3, iterations=60),
    "entropic": dict(value="entropic"),
    "implicit and unbalanced": dict(gradient="implicit", rho=0.7, value="entropic"),
    "envelope": dict(gradient="envelope", value="entropic"),
    "ragged": dict(lengths=True),
    "ragged, annealed and unbalanced": dict(lengths=True, annealing=0.6, rho=0.3),
}
SIZES = [(5, 5), (7, 70), (130, 33), (300, 257), (1, 1), (1, 9)]


def ragged(n, m, *sides):
    """Lengths of three problems, and marginals of mass 1 within them."""
    lengths = torch.tensor([[n, m], [(n + 1) // 2, m], [1, (m + 2) // 3]])
    for side, count in enumerate((n, m)):
        there = torch.arange(count) < lengths[:, side, None]
        mass = torch.where(there, sides[side], 0)
        sides[side].copy_(mass / mass.sum(-1, keepdim=True))
    return lengths


def assert_is_the_reference(run, plain, label):
    """Every field of a `Transport` and the gradients beside it; float64."""
    (found, gradients), (want, wanted) = run(), plain(run)
    for name in found._fields:
        if getattr(want, name) is not None:
            assert_same(getattr(found, name), getattr(want, name), f"{name} {label}", 1e-8, 1e-9)
    for number, (got, expected) in enumerate(zip(gradients, wanted, strict=True)):
        # Where a marginal is 0 the reference's logarithm has no derivative.
        expected = torch.where(expected.isfinite(), expected, got)
        scale = max(1.0, float(expected.abs().max()))
        assert_same(got, expected, f"gradient {number} {label}", 1e-7, 1e-9 * scale)


@pytest.mark.parametrize("epsilon", [0.1, 0.003])
@pytest.mark.parametrize("domain", ["auto", "log"])
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case, domain, epsilon, plain, level):
    """Every field and gradient; an epsilon of 0.003 needs sums out of floats' range."""
    # The executor is slow, and of the shorter ones has all ways.
    sizes = [size for size in SIZES if size != (300, 257)] if level == "simt" else SIZES
    for number, (n, m) in enumerate(sizes):
        options = dict(iterations=4, domain=domain, epsilon=epsilon) | CASES[case]
        if options.get("gradient", "unrolled") != "unrolled" and (n > 100 or epsilon < 0.1):
            continue  # the reference inverts a matrix of n + m
        cost, a, b = problem(3, n, m, zeros=number % 2 == 1 and "lengths" not in options)
        if "lengths" in options:
            options["lengths"] = ragged(n, m, a, b)
        upstream = torch.randn(3, dtype=DOUBLE)

        def run(cost=cost, a=a, b=b, upstream=upstream, options=options):
            return with_gradients(cost, a, b, upstream, **options)

        assert_is_the_reference(run, plain, f"{n} x {m}")


@pytest.mark.parametrize("options", [dict(), dict(rho=0.7, value="entropic", annealing=0.5)])
@pytest.mark.parametrize("m", [600, 4097, 8200])
def test_rows_of_any_length(m, options, plain, level):
    """What a team of a GPU keeps of a row, and longer ones."""
    for dtype in (DOUBLE, torch.float32):
        cost, a, b = (x.to(dtype) for x in problem(2, 5, m))
        upstream = torch.randn(2, dtype=dtype)
        options = dict(epsilon=0.05, iterations=3) | options
        if dtype == DOUBLE:
            assert_is_the_reference(
                lambda: with_gradients(cost, a, b, upstream, **options),  # noqa: B023
                plain,
                f"{m}",
            )
            continue
        found, gradients = with_gradients(cost, a, b, upstream, **options)
        want, wanted = with_gradients(
            cost.double(), a.double(), b.double(), upstream.double(), **options
        )
        assert_same(found.value, want.value, rtol=1e-5)
        assert_same(found.plan, want.plan, rtol=2e-4, atol=1e-9)
        for got, expected in zip(gradients, wanted, strict=True):
            scale = float(expected.abs().max())
            assert_same(got, expected, rtol=1e-3, atol=2e-5 * scale)


@pytest.mark.parametrize("domain", ["auto", "log"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_costs(dtype, domain, plain, level):
    """float32 throughout, of costs that are widened; the gradient in their own type."""
    cost, a, b = problem(3, 50, 50, torch.float32)
    cost, upstream = cost.to(dtype), torch.randn(3)
    options = dict(epsilon=0.1, domain=domain)
    found, gradients = with_gradients(cost, a, b, upstream, **options)
    want, wanted = plain(
        lambda: with_gradients(cost.double(), a.double(), b.double(), upstream.double(), **options)
    )
    assert gradients[0].dtype == dtype
    assert found.value.dtype == torch.float32
    assert_same(found.value, want.value, rtol=1e-5)
    assert_same(found.plan, want.plan, rtol=1e-4, atol=1e-8)
    coarse = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert_same(gradients[0], wanted[0], rtol=coarse, atol=coarse * float(wanted[0].abs().max()))


@pytest.mark.parametrize("domain", ["auto", "log"])
@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
def test_lengths_are_problems_of_their_own(domain, gradient, level):
    """Each alone gives the same, bit for bit, whatever lies beside it."""
    sizes = [(5, 5), (17, 3), (1, 40), (64, 40)]
    lengths = torch.tensor(sizes)
    value = "entropic" if gradient == "envelope" else "transport"
    options = dict(epsilon=0.1, iterations=30, gradient=gradient, value=value, domain=domain)
    cost = torch.full((4, 64, 40), torch.inf)
    cost[1], cost[2] = 1e4, 0.0
    a, b = torch.full((4, 64), 9.0), torch.full((4, 40), 9.0)
    parts = []
    for number, (n, m) in enumerate(sizes):
        own, mass_a, mass_b = problem(1, n, m, torch.float32, seed=number)
        cost[number, :n, :m], a[number, :n], b[number, :m] = own[0], mass_a[0], mass_b[0]
        parts.append((own, mass_a, mass_b))
    found, gradients = with_gradients(cost, a, b, torch.ones(4), lengths=lengths, **options)
    for number, ((n, m), (own, mass_a, mass_b)) in enumerate(zip(sizes, parts, strict=True)):
        want, wanted = with_gradients(own, mass_a, mass_b, torch.ones(1), **options)
        assert torch.equal(found.value[number], want.value[0])
        assert torch.equal(found.f[number, :n], want.f[0])
        assert torch.equal(found.plan[number, :n, :m], want.plan[0])
        assert not found.plan[number, n:].any()
        assert not found.plan[number, :, m:].any()
        for got, expected, rows in zip(gradients, wanted, (n, n, m), strict=True):
            inside = got[number, :n, :m] if got.dim() == 3 else got[number, :rows]
            assert torch.equal(inside, expected[0])
            assert not got[number, rows:].any()
        assert not gradients[0][number, :, m:].any()


def test_a_converged_problem_freezes(level):
    """Each stops at its own iteration and is what it is alone."""
    cost, a, b = problem(6, 20, 20, torch.float32)
    cost = cost * torch.tensor([0.01, 3.0, 0.1, 1.0, 0.3, 0.01])[:, None, None]
    options = dict(epsilon=0.1, tolerance=1e-5, iterations=400)
    for domain in ("auto", "log"):
        found, (gradient, _, _) = with_gradients(
            cost, a, b, torch.ones(6), domain=domain, **options
        )
        assert len(set(found.iterations_used.tolist())) > 2
        assert (found.iterations_used % 5 == 0).all()
        assert (found.marginal_error <= 1.1e-5).all()
        for i in range(6):
            alone, (own, _, _) = with_gradients(
                cost[i : i + 1], a[i : i + 1], b[i : i + 1], torch.ones(1), domain=domain, **options
            )
            assert torch.equal(alone.value, found.value[i : i + 1])
            assert torch.equal(alone.iterations_used, found.iterations_used[i : i + 1])
            assert torch.equal(own[0], gradient[i])


def test_results_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    for groups, n, m in ((5, 32, 32), (1, 700, 300)):
        cost, a, b = problem(groups, n, m, torch.float32)
        runs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found, gradients = with_gradients(cost, a, b, torch.ones(groups), epsilon=0.05)
            runs.append([found.value, found.plan, *gradients])
        torch.set_num_threads(threads)
        for other in runs[1:]:
            assert all(map(torch.equal, runs[0], other))


@pytest.mark.parametrize("domain", ["auto", "log"])
def test_infinite_costs_forbid(domain):
    cost, a, b = problem(1, 6, 6)
    cost[0, 0, 1:4] = torch.inf
    found, (gradient, _, _) = with_gradients(
        cost, a, b, torch.ones(1, dtype=DOUBLE), epsilon=0.1, iterations=300, domain=domain
    )
    assert not found.plan[0, 0, 1:4].any()
    assert found.value.isfinite().all()
    assert gradient.isfinite().all()
    assert_same(found.plan.sum(2), a, rtol=1e-6)
    far, _ = with_gradients(
        cost.clamp(max=20.0), a, b, torch.ones(1, dtype=DOUBLE), epsilon=0.1, iterations=300
    )
    assert_same(found.value, far.value, rtol=1e-8)


# ---- gradients


@pytest.mark.parametrize("rho", [None, 0.8, (0.5, None)])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("domain", ["auto", "log"])
def test_gradcheck(domain, value, rho):
    inputs = [x.requires_grad_() for x in problem(2, 4, 5)]

    def unrolled(cost, a, b):
        options = dict(a=a, b=b, iterations=6, rho=rho, value=value, domain=domain)
        return ops.sinkhorn(cost, 0.2, **options).value

    assert torch.autograd.gradcheck(unrolled, inputs, check_undefined_grad=False)


@pytest.mark.parametrize("domain", ["auto", "log"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_gradient_of_some_inputs_alone(gradient, domain):
    """Of marginals without costs, of one cloud without the other: what they have among all."""
    value = "entropic" if gradient == "envelope" else "transport"
    options = dict(epsilon=0.2, gradient=gradient, value=value, domain=domain)
    cost, a, b = problem(2, 70, 9)
    upstream = torch.ones(2, dtype=DOUBLE)
    _, want = with_gradients(cost, a, b, upstream, **options)
    own = a.clone().requires_grad_()
    epsilon = options.pop("epsilon")
    ops.sinkhorn(cost, epsilon, a=own, b=b, **options).value.sum().backward()
    assert_same(own.grad, want[1])
    x, y = torch.randn(2, 70, 3, dtype=DOUBLE), torch.randn(2, 9, 3, dtype=DOUBLE)
    given = [each.clone().requires_grad_() for each in (x, y)]
    ops.sinkhorn_points(*given, epsilon, a=a, b=b, **options).value.sum().backward()
    for place, points in enumerate((x, y)):
        one = [x, y]
        one[place] = points.clone().requires_grad_()
        ops.sinkhorn_points(*one, epsilon, a=a, b=b, **options).value.sum().backward()
        assert_same(one[place].grad, given[place].grad)


@pytest.mark.parametrize("rho", [None, 0.8, (0.5, None)])
@pytest.mark.parametrize("epsilon", [0.05])
def test_gradients_meet_at_the_fixed_point(epsilon, rho, level):
    """Unrolled, implicit and, of the entropic value, envelope; of marginals up to a constant."""
    cost, a, b = problem(3, 12, 9, zeros=True)
    upstream = torch.randn(3, dtype=DOUBLE)
    options = dict(epsilon=epsilon, iterations=300 if level == "simt" else 3000, rho=rho)
    for value, others in (("transport", ["implicit"]), ("entropic", ["implicit", "envelope"])):
        _, want = with_gradients(cost, a, b, upstream, value=value, **options)
        for gradient in others:
            _, got = with_gradients(cost, a, b, upstream, value=value, gradient=gradient, **options)
            assert_same(got[0], want[0], f"{value} {gradient}", 1e-6, 1e-9)
            for x, y, mass in zip(got[1:], want[1:], (a, b), strict=True):
                difference = torch.where(mass > 0, x - y, torch.nan)
                if rho is None:
                    difference = difference - difference.nanmean(-1, keepdim=True)
                assert float(difference.nan_to_num().abs().max()) < 1e-6


@pytest.mark.parametrize("domain", ["auto", "log"])
def test_the_implicit_gradient_of_kept_marginals(domain, level):
    """They leave a constant open, which rounding must not get into."""
    cost = 2 * problem(16, 40, 40, torch.float32)[0]
    upstream = torch.ones(16)
    options = dict(iterations=100, gradient="implicit", domain=domain, epsilon=0.2)
    _, (want, *_) = with_gradients(cost.double(), None, None, upstream.double(), **options)
    _, (got, *_) = with_gradients(cost, None, None, upstream, **options)
    assert_same(got, want, rtol=0, atol=5e-6)


def test_twenty_iterations_are_nearly_the_fixed_point():
    """1e-3 apart at the settings of SinKD; the envelope is far off."""
    student, teacher = (3 * torch.randn(2, 8, 10, dtype=DOUBLE)).unbind(0)
    cost = ops.pairwise_l1((student / 2).softmax(-1), (teacher / 2).softmax(-1))[None]
    up = torch.ones(1, dtype=DOUBLE)
    _, (unrolled, _, _) = with_gradients(cost, None, None, up, epsilon=0.1)
    _, (implicit, _, _) = with_gradients(cost, None, None, up, epsilon=0.1, gradient="implicit")
    assert 1e-12 < float((unrolled - implicit).norm() / implicit.norm()) < 5e-3
    plan = ops.sinkhorn(cost, 0.1).plan
    assert float((plan - implicit).norm() / implicit.norm()) > 0.05


# ---- POT


@pytest.mark.parametrize(
    ("epsilon", "method"),
    [(e, "sinkhorn_log") for e in (1.0, 0.1, 0.01, 0.001)]
    + [(e, "sinkhorn") for e in (1.0, 0.1, 0.01)],
)
@pytest.mark.parametrize(("n", "m"), [(12, 12), (9, 21), (1, 7), (7, 1)])
def test_agrees_with_pot(n, m, epsilon, method):
    """Plan, value and gradient at convergence, with marginals of 0 where it knows these."""
    ot = pytest.importorskip("ot")
    cost, a, b = problem(1, n, m, zeros=method == "sinkhorn_log", seed=3)
    iterations = 100_000 if epsilon < 0.05 else 4000
    options = dict(iterations=iterations, a=a, b=b, tolerance=1e-11, gradient="implicit")
    given = cost.clone().requires_grad_()
    found = ops.sinkhorn(given, epsilon, **options)
    found.value.backward()
    plan = ot.sinkhorn(a[0], b[0], cost[0], epsilon, method, numItermax=iterations, stopThr=1e-11)
    assert_same(found.plan[0], plan, method, 1e-6, 1e-8)
    assert_same(found.value[0], (plan * cost[0]).sum(), method, 1e-6)
    theirs = cost[0].clone().requires_grad_()
    plan = ot.sinkhorn(a[0], b[0], theirs, epsilon, method, numItermax=4000, stopThr=1e-12)
    (plan * theirs).sum().backward()
    there = (a[0] > 0)[:, None] & (b[0] > 0)  # where a marginal is 0 theirs is NaN
    assert_same(given.grad[0][there], theirs.grad[there], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rho", [0.05, 1.0, 20.0])
def test_unbalanced_agrees_with_pot(rho):
    ot = pytest.importorskip("ot")
    cost, a, b = problem(1, 11, 8)
    b = 1.7 * b
    plan = ot.unbalanced.sinkhorn_unbalanced(
        a[0], b[0], cost[0], 0.1, rho, "sinkhorn", "entropy", numItermax=20000, stopThr=1e-13
    )
    found = ops.sinkhorn(cost, 0.1, a=a, b=b, rho=rho, iterations=3000)
    assert_same(found.plan[0], plan, rtol=1e-6)


# ---- points


@pytest.mark.parametrize("cost", GROUNDS[1:])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("d", [3, 40])
def test_points_are_their_matrix(cost, gradient, d, level):
    value = "entropic" if gradient == "envelope" else "transport"
    x, y = torch.randn(3, 70, d, dtype=DOUBLE), torch.randn(3, 40, d, dtype=DOUBLE)
    x[0, 0] = y[0, 0]  # a distance of 0
    _, a, b = problem(3, 70, 40)
    lengths = torch.tensor([[70, 40], [5, 17], [66, 1]])
    for domain in ("auto", "log"):
        given = [each.clone().requires_grad_() for each in (x, y, x, y)]
        options = dict(
            a=(a * (torch.arange(70) < lengths[:, :1])),
            b=(b * (torch.arange(40) < lengths[:, 1:])),
            lengths=lengths,
            gradient=gradient,
            value=value,
            domain=domain,
        )
        for name in ("a", "b"):
            options[name] = options[name] / options[name].sum(-1, keepdim=True)
        epsilon = 2.0 if cost == "sqeuclidean" else 0.5
        found = ops.sinkhorn_points(*given[:2], epsilon, cost=cost, **options)
        matrix = sinkhorn_reference.distances(given[2], given[3], cost)
        want = ops.sinkhorn(matrix, epsilon, **options)
        assert found.plan is None
        for name in ("value", "f", "g", "marginal_error"):
            assert_same(getattr(found, name), getattr(want, name), name)
        upstream = torch.randn(3, dtype=DOUBLE)
        for each in (found, want):
            (each.value * upstream).sum().backward()
        assert_same(given[0].grad, given[2].grad, cost, 1e-8, 1e-10)
        assert_same(given[1].grad, given[3].grad, cost, 1e-8, 1e-10)


def test_debiased_points(level, plain):
    x, y = torch.randn(2, 30, 4, dtype=DOUBLE), torch.randn(2, 20, 4, dtype=DOUBLE)
    _, a, b = problem(2, 30, 20)
    options = dict(epsilon=0.5, cost="l1", iterations=50)
    same = ops.sinkhorn_points(x, x, a=a, b=a, debias=True, **options)
    assert float(same.value.abs().max()) < 1e-12
    other = ops.sinkhorn_points(x, y, a=a, b=b, debias=True, **options)
    parts = [
        ops.sinkhorn_points(p, q, a=s, b=t, **options).value
        for p, q, s, t in ((x, y, a, b), (x, x, a, a), (y, y, b, b))
    ]
    assert_same(other.value, parts[0] - (parts[1] + parts[2]) / 2)
    assert (other.value > 0).all()

    def run():
        given = [each.clone().requires_grad_() for each in (x, y, a, b)]
        x_given, y_given, a_given, b_given = given
        found = ops.sinkhorn_points(x_given, y_given, a=a_given, b=b_given, debias=True, **options)
        found.value.sum().backward()
        return found, [each.grad for each in given]

    assert_is_the_reference(run, plain, "debiased")


def test_clouds_that_are_handed_on_in_parts(level):
    """The derivatives of so many costs are not there at the same time on a GPU; the second cloud's
    gradient is added up over the parts."""
    n = 3000 if level == "cuda" else 400
    x, y = torch.rand(1, n + 10, 1), torch.rand(1, n, 1)
    mass = dict(a=torch.full((n + 10,), 1 / (n + 10)), b=torch.full((n,), 1 / n))
    options = dict(epsilon=0.1, iterations=1)
    for dtype, coarse in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        given = [each.to(dtype, copy=True).requires_grad_() for each in (x, y)]
        same = [each.detach().double().requires_grad_() for each in given]
        ops.sinkhorn_points(*given, cost="l1", **mass, **options).value.sum().backward()
        cost = sinkhorn_reference.distances(*same, "l1")
        wide = {name: each.double() for name, each in mass.items()}
        ops.sinkhorn(cost, **wide, **options).value.sum().backward()
        for got, want in zip(given, same, strict=True):
            scale = float(want.grad.abs().max())
            assert_same(got.grad, want.grad, rtol=coarse, atol=coarse * scale)


def test_clouds_are_large_without_a_matrix():
    """8,192 points a side are 268 MB of costs: the process grows by a twentieth of that."""
    script = """
import resource, torch
from stillhouse import ops
x, y = (torch.rand(1, 8192, 2) for _ in range(2))
x.requires_grad_()
small = ops.sinkhorn_points(x[:, :64], y[:, :64], 0.1, iterations=2)
small.value.backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = ops.sinkhorn_points(x, y, 0.1, iterations=2)
found.value.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, float(found.value))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=300
    )
    grown, value = result.stdout.split()
    assert int(grown) * 1024 < 8192 * 8192 * 4 / 20
    assert 0 < float(value) < 8192
