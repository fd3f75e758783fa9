"""Residual quantization against brute force in float64, closed forms and plain torch."""

import pytest
import torch

from stillhouse import ops
from stillhouse.ops import divergence_autograd, rvq_autograd, rvq_reference
from stillhouse.ops.rvq_autograd import rotated_gradient

BEST = ops.cpu_level()
EXACTLY = dict(rtol=0, atol=0)


def problem(n, d, k, q, *, groups=(), dtype=torch.float32, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(*shape):
        shape = *groups, *shape
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
        return drawn.to(torch.get_default_device())

    shrinking = 0.6 ** torch.arange(q, dtype=torch.float64)[:, None, None]
    tables = draw(q, k, d) * shrinking
    tables = tables if dtype == torch.float64 else tables.float()
    return draw(n, d).to(dtype), tables


def brute_force(x, tables, stages=None, metric="l2"):
    """Distances of all codes in float64: codes, gap of the second nearest, residuals."""
    residual, codes, gaps, left = x.double(), [], [], [x.double()]
    for stage in range(len(tables) if stages is None else stages):
        table = tables[min(stage, len(tables) - 1)].double()
        if metric == "l2":
            distance = (residual[:, None] - table).square().sum(-1)
        else:
            unit = table / table.norm(dim=-1, keepdim=True).clamp(min=1e-300)
            distance = -2 * residual @ unit.T
        two = distance.topk(min(2, len(table)), -1, largest=False).values
        codes.append(distance.argmin(-1))
        gaps.append(two[:, -1] - two[:, 0])
        residual = residual - table[codes[-1]]
        left.append(residual)
    return torch.stack(codes, -1), torch.stack(gaps, -1), left


SHAPES = [
    (1, 128, 1024, 8),
    (7, 33, 100, 3),
    (64, 16, 64, 2),
    (700, 8, 65, 9),
    (1300, 40, 130, 4),
    (50, 1, 1, 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_brute_force(level, shape, dtype):
    x, tables = problem(*shape, dtype=dtype)
    found = ops.rvq(x, tables)
    expected, gaps, left = brute_force(x, tables)
    sure = (gaps > 1e-5).cummin(-1).values  # after a close call the residuals differ
    assert (found.codes == expected)[sure].all()
    assert sure.float().mean() > 0.99 or shape[2] == 1
    whole = sure.all(-1)
    torch.testing.assert_close(
        found.out.double()[whole], (x - left[-1])[whole].double(), atol=1e-5, rtol=1e-5
    )
    errors = torch.stack([each.square().sum(-1) for each in left[1:]], -1)
    torch.testing.assert_close(found.error.double()[whole], errors[whole], atol=1e-4, rtol=1e-5)
    assert found.out.dtype == tables.dtype
    assert torch.equal(ops.rvq_encode(x, tables), found.codes)
    assert torch.equal(ops.rvq_decode(found.codes, tables), found.out)


# Rows that fill CUDA's tiles for tensor cores, of either size.
@pytest.mark.parametrize("n", [50, 100, 150])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_candidates_of_tensor_cores(n, metric, level):
    """The search for margins scores every code exactly; both find the same."""
    x, tables = problem(n, 44, 330, 3)
    tables[1] *= 10 ** torch.linspace(-3, 1, 330)[:, None]  # lengths of all sizes
    tables[2] = tables[2, :1] + 1e-3 * tables[2]  # and codes that lie close together
    codes = ops.rvq_encode(x, tables, metric=metric)
    exact, margin = ops.rvq_encode(x, tables, metric=metric, return_margin=True)
    assert torch.equal(codes, exact)
    expected, gaps, _ = brute_force(x, tables, metric=metric)
    sure = (gaps > 1e-5).cummin(-1).values
    assert (codes == expected)[sure].all()
    assert sure[:, :2].all() or sure.float().mean() > 0.9
    assert (margin >= 0).all()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_scores_are_the_same_bit_by_bit(metric, level):
    """Of all that round a product and its sum once; what margins are differences of."""
    x, tables = problem(40, 75, 130, 3)
    _, found = ops.rvq_encode(x, tables, metric=metric, return_margin=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergence_autograd, "_kernels", torch.ops.stillhouse)
        ops.cpu_level(BEST)
        _, expected = ops.rvq_encode(x.cpu(), tables.cpu(), metric=metric, return_margin=True)
    rounds_twice = level == 0 or BEST == 0
    torch.testing.assert_close(found.cpu(), expected, **({} if rounds_twice else EXACTLY))


def test_more_candidates_than_there_is_room_for(level):
    """Equal codes by the hundred, nearly equal ones, scores that overflow, rows not finite."""
    x, tables = problem(100, 36, 300, 2)
    tables[0, 40:] = tables[0, 40]
    tables[1, 7:] = tables[1, 7] * (1 + 1e-6 * torch.arange(293)[:, None])
    x[3] = 1e19
    x[4] = 3e38
    x[5, 2], x[6, 2] = torch.nan, -torch.inf
    x[50:] = tables[0, 40] * 1.1
    codes = ops.rvq_encode(x, tables)
    exact, _ = ops.rvq_encode(x, tables, return_margin=True)
    assert torch.equal(codes, exact)
    assert (codes[50:, 0] == 40).all()
    assert (codes[4:7, 0] == -1).all()


def test_a_hundred_thousand_rows():
    x, tables = problem(100_000, 16, 256, 2)
    codes, margin = ops.rvq_encode(x, tables, return_margin=True)
    for part in range(0, len(x), 10_000):
        rows = slice(part, part + 10_000)
        expected, gaps, _ = brute_force(x[rows], tables)
        sure = (gaps > 1e-5).cummin(-1).values
        assert (codes[rows] == expected)[sure].all()
        torch.testing.assert_close(margin[rows].double()[sure], gaps[sure], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 5, 64, 600])
def test_a_row_does_not_depend_on_its_batch(level, n):
    x, tables = problem(600, 24, 200, 4)
    whole = ops.rvq(x, tables)
    part = ops.rvq(x[:n], tables)
    assert torch.equal(part.codes, whole.codes[:n])
    assert torch.equal(part.error, whole.error[:n])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(ops.rvq(x, tables).out, whole.out)
    finally:
        torch.set_num_threads(before)


def test_ties_go_to_the_lowest(level):
    """Equal codes in one lane, in other lanes, in other blocks; and a row as far from two."""
    table = torch.randn(300, 5)
    for copy in (299, 64, 16, 8, 4, 1):
        table[copy] = table[0]
    x = table[[0, 299, 64, 16, 8, 4, 1]]
    assert ops.rvq_encode(x, table[None]).tolist() == [[0]] * 7
    assert ops.rvq_encode(x.repeat(100, 1), table[None]).unique().tolist() == [0]
    between = torch.tensor([[0.0], [2.0], [-2.0]])
    assert ops.rvq_encode(torch.tensor([[1.0], [-1.0]]), between[None]).tolist() == [[0], [0]]
    _, margin = ops.rvq_encode(x, table[None], return_margin=True)
    assert (margin == 0).all()


def test_depth_and_mask(level):
    x, tables = problem(40, 12, 70, 5)
    depth = torch.arange(40) % 6
    found = ops.rvq(x, tables, num_quantizers=depth)
    for stages in range(1, 6):
        rows = depth == stages
        alone = ops.rvq(x[rows], tables, num_quantizers=stages)
        assert torch.equal(found.codes[rows, :stages], alone.codes)
        assert torch.equal(found.out[rows], alone.out)
        assert torch.equal(found.error[rows, :stages], alone.error)
        assert (found.codes[rows, stages:] == -1).all()
        assert not found.error[rows, stages:].any()
    mask = torch.arange(40) % 3 > 0
    masked = ops.rvq(x, tables, mask=mask, num_quantizers=3)
    assert torch.equal(masked.codes[mask], ops.rvq_encode(x[mask], tables, num_quantizers=3))
    assert (masked.codes[~mask] == -1).all()
    assert not masked.out[~mask].any()
    counts, sums = ops.rvq_statistics(x, found.codes, tables, mask=mask)
    kept = ops.rvq_statistics(x[mask], found.codes[mask], tables)
    assert torch.equal(counts, kept[0])
    torch.testing.assert_close(sums, kept[1])


def test_shared_groups_and_sizes(level):
    x, tables = problem(30, 6, 50, 3)
    shared = tables[:1].expand(4, -1, -1)
    expected, _, _ = brute_force(x, tables[:1], stages=4)
    assert torch.equal(ops.rvq_encode(x, shared), expected)
    counts, _ = ops.rvq_statistics(x, expected, shared)
    assert counts.shape == (1, 50)
    assert counts.sum() == 120

    rows, grouped = problem(30, 6, 50, 3, groups=(2,))
    found = ops.rvq(rows.view(2, 5, 6, 6), grouped)
    assert found.codes.shape == (2, 5, 6, 3)
    for group in range(2):
        alone = ops.rvq(rows[group], grouped[group])
        assert torch.equal(found.codes[group].view(30, 3), alone.codes)
        assert torch.equal(found.out[group].view(30, 6), alone.out)

    sizes = torch.tensor([50, 7, 1])
    codes = ops.rvq_encode(x, tables, sizes=sizes)
    assert (codes.amax(0) < sizes).all()
    cut = [table[:size] for table, size in zip(tables, sizes, strict=True)]
    residual = x
    for stage, table in enumerate(cut):
        assert torch.equal(codes[:, stage], ops.rvq_encode(residual, table[None])[:, 0])
        residual = residual - table[codes[:, stage]]


def test_cosine(level):
    x, tables = problem(200, 9, 80, 3)
    expected, gaps, _ = brute_force(x, tables, metric="cosine")
    codes, margin = ops.rvq_encode(x, tables, metric="cosine", return_margin=True)
    sure = (gaps > 1e-5).cummin(-1).values
    assert (codes == expected)[sure].all()
    torch.testing.assert_close(margin.double()[sure], gaps[sure], atol=1e-5, rtol=1e-4)
    grown = ops.rvq_encode(x, tables[:1] * 3, metric="cosine")
    assert torch.equal(grown, codes[:, :1])


def test_rows_that_are_not_finite(level):
    x, tables = problem(700, 6, 20, 2)
    expected = ops.rvq_encode(x, tables)
    x[3, 2], x[9, 0], x[650, 5] = torch.nan, torch.inf, -torch.inf
    found = ops.rvq(x, tables)
    broken = torch.zeros(700, dtype=torch.bool)
    broken[[3, 9, 650]] = True
    assert (found.codes[broken] == -1).all()
    assert found.out[broken].isnan().all()
    assert found.error[broken].isnan().all()
    assert torch.equal(found.codes[~broken], expected[~broken])


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_plain_torch_is_the_same(metric):
    x, tables = problem(90, 11, 70, 4, groups=(2,), dtype=torch.float64)
    depth = torch.arange(90).expand(2, 90) % 5
    sizes = torch.tensor([[70, 9, 70, 3]] * 2)
    options = dict(metric=metric, num_quantizers=depth, sizes=sizes)
    found = ops.rvq(x, tables, **options)
    codes, out, error, margin = rvq_reference.encode(x, tables, metric, sizes, depth, 4)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.out, out)
    torch.testing.assert_close(found.error, error)
    torch.testing.assert_close(ops.rvq_encode(x, tables, return_margin=True, **options)[1], margin)
    counts, sums = ops.rvq_statistics(x, codes, tables)
    expected = rvq_reference.statistics(x, codes, tables)
    assert torch.equal(counts, expected[0])
    torch.testing.assert_close(sums, expected[1])
    upstream = torch.randn(codes.shape, dtype=torch.float64)
    op = torch.ops.stillhouse.rvq_gradient(upstream, x, codes, tables, True, True)
    for ours, theirs in zip(
        op, rvq_reference.gradient(upstream, x, codes, tables, True, True), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ops.rvq_decode(codes, tables), rvq_reference.decode(codes, tables))


# Gradients ----------------------------------------------------------------------------------------


def jacobian(x, tables, grad):
    """d out / d x of one row."""
    row = x[:1].clone().requires_grad_()
    out = ops.rvq(row, tables, grad=grad).out
    rows = [torch.autograd.grad(out[0, i], row, retain_graph=True)[0][0] for i in range(x.shape[1])]
    return torch.stack(rows)


def test_what_each_mode_says(level):
    x, tables = problem(1, 7, 30, 3, dtype=torch.float64)
    identity = torch.eye(7, dtype=torch.float64)
    assert torch.equal(jacobian(x, tables, "ste"), identity)
    assert torch.equal(jacobian(x, tables, "encodec"), identity)
    assert torch.equal(jacobian(x, tables, "stage_sum"), 3 * identity)
    out = ops.rvq(x, tables).out[0]
    turned = jacobian(x, tables, "rotation")
    torch.testing.assert_close(turned @ x[0], out)  # lambda R x is out itself
    scale = out.norm() / x[0].norm()
    torch.testing.assert_close(turned @ turned.T, scale**2 * identity)
    total, residual = torch.zeros(7, 7, dtype=torch.float64), x
    for stage in range(3):
        total += jacobian(residual, tables[stage : stage + 1], "rotation")
        residual = residual - ops.rvq(residual, tables[stage : stage + 1]).out
    torch.testing.assert_close(jacobian(x, tables, "rotation_per_stage"), total)


def test_rotations_that_there_are_not():
    g, x = torch.randn(3, 4), torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 2, 0, 0]])
    q = torch.tensor([[-2.0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(rotated_gradient(g, x, q), g)


@pytest.mark.parametrize("grad", ["ste", "encodec"])
def test_errors_have_gradients(grad, level):
    """As autograd has them of the loss written out, with codes held fixed."""
    x, tables = problem(20, 6, 12, 3, dtype=torch.float64)
    weight = torch.rand(20, 3, dtype=torch.float64)
    ours = [x.clone().requires_grad_(), tables.clone().requires_grad_()]
    found = ops.rvq(*ours, grad=grad)
    (found.error * weight).sum().backward()
    plain = [x.clone().requires_grad_(), tables.clone().requires_grad_()]
    loss, taken = 0, torch.zeros_like(x)
    for stage in range(3):
        code = plain[1][stage][found.codes[:, stage]]
        # Of an input that the output is passed straight through to, later residuals know nothing.
        own = plain[0] if grad == "ste" or stage == 0 else plain[0].detach()
        residual = own - taken
        to_x = (residual - code.detach()).square().sum(-1)
        to_code = (residual.detach() - code).square().sum(-1)
        loss = loss + (weight[:, stage] * (to_x + to_code)).sum()
        taken = taken + code.detach()
    loss.backward()
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert ours[1].grad[2].abs().sum() > 0


def test_a_shared_tables_gradient_is_that_of_all_stages(level):
    x, tables = problem(20, 6, 12, 1, dtype=torch.float64)
    shared = tables.clone().requires_grad_()
    ops.rvq(x, shared.expand(3, -1, -1)).error.sum().backward()
    apart = tables.repeat(3, 1, 1).requires_grad_()
    ops.rvq(x, apart).error.sum().backward()
    torch.testing.assert_close(shared.grad[0], apart.grad.sum(0))


def test_decoding_has_a_gradient():
    codes = torch.tensor([[[0, 1], [2, -1]], [[2, 0], [1, 1]]])
    tables = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.rvq_decode(codes, t), tables)
    shared = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.rvq_decode(codes, t.expand(2, -1, -1)), shared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [False, True])
def test_statistics_and_gradients_along_codes(shared, dtype, level):
    x, tables = problem(70, 140, 9, 3, dtype=dtype)
    tables = tables[:1] if shared else tables
    codes = torch.randint(-1, 9, (70, 3))
    given = x[None], codes[None], tables[None]
    counts, sums = ops.rvq_statistics(x, codes, tables.expand(3, -1, -1))
    for ours, theirs in zip((counts, sums), rvq_reference.statistics(*given), strict=True):
        torch.testing.assert_close(ours, theirs[0])
    upstream = torch.randn(1, 70, 3, dtype=dtype)
    plain = rvq_reference.gradient(upstream, *given, True, True)
    for wanted in ((True, True), (True, False), (False, True)):
        for ours, theirs in zip(
            rvq_autograd.gradient(upstream, *given, *wanted), plain, strict=True
        ):
            if ours.numel():
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_sums_do_not_depend_on_threads():
    x, tables = problem(3000, 20, 40, 3)
    codes = ops.rvq_encode(x, tables)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(ops.rvq_statistics(x, codes, tables)[1])
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_torch_knows_the_ops():
    x, tables = problem(30, 6, 70, 3, groups=(1,))
    kernels = torch.ops.stillhouse
    packed = kernels.rvq_pack(tables, None, 0)
    arguments = (x, tables, packed, None, None, 3, True, True, True)
    codes = kernels.rvq_encode(*arguments)[0]
    check = torch.library.opcheck
    check(kernels.rvq_pack.default, (tables, None, 0))
    check(kernels.rvq_encode.default, arguments)
    coupled = (x.repeat(1, 1, 3), tables, packed, None, torch.randn(1, 18, 18), 3)
    check(kernels.rvq_encode.default, (*coupled, True, True, False))
    one = (x, tables[:, :1], packed[:, :1].contiguous(), 2, 0.5, 1, 0, None)
    check(kernels.rvq_candidates.default, one)
    check(kernels.rvq_decode.default, (codes, tables))
    check(kernels.rvq_statistics.default, (x, codes, tables))
    check(kernels.rvq_gradient.default, (torch.randn(1, 30, 3), x, codes, tables, True, False))


def test_compiled():
    x, tables = problem(30, 6, 70, 3)

    def loss(x, tables):
        found = ops.rvq(x, tables, grad="rotation")
        return (found.out * 2).sum() + found.error.sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        own = x.clone().requires_grad_()
        function(own, tables).backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients)
