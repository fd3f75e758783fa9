"""Products with dual-binary weights against the sum by hand, float64 and integers."""

import pytest
import torch

from stillhouse import ops
from stillhouse.ops import fdb_reference

EXACTLY = dict(rtol=0, atol=0)
SHAPES = [(5, 96, 32), (16, 128, 128), (7, 130, 65), (1, 31, 31), (3, 33, 1), (33, 64, 64)]
ROWS = [1, 2, 3, 8, 33]


def problem(rows, columns, group, *, dtype=torch.float32, seed=0, integers=False):
    """Planes and scales of [rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    planes = torch.rand(2, rows, columns, generator=generator) < 0.4
    shape = 2, rows, columns // group
    if integers:
        return planes, torch.randint(-8, 9, shape, generator=generator).to(dtype)
    return planes, torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(m, columns, seed=1, dtype=torch.float32, integers=False):
    generator = torch.Generator().manual_seed(seed)
    if integers:
        return torch.randint(-8, 9, (m, columns), generator=generator).to(dtype)
    return torch.randn(m, columns, generator=generator, dtype=torch.float64).to(dtype)


def by_hand(x, planes, alpha):
    """Two masked sums a group, in Python's own numbers."""
    group = planes.shape[2] // alpha.shape[2]
    x, planes, alpha = x.tolist(), planes.tolist(), alpha.tolist()
    y = [[0.0] * len(planes[0]) for _ in x]
    for m, row in enumerate(x):
        for n in range(len(planes[0])):
            for plane, scale in zip(planes, alpha, strict=True):
                for g, a in enumerate(scale[n]):
                    chosen = range(g * group, (g + 1) * group)
                    y[m][n] += a * sum(row[k] for k in chosen if plane[n][k])
    return torch.tensor(y, dtype=torch.float64)


# Words --------------------------------------------------------------------------------------------


def test_bit_k_of_word_k_over_32_lowest_first():
    planes = torch.zeros(2, 1, 70, dtype=torch.bool)
    planes[0, 0, [0, 5, 31, 32, 69]] = True
    planes[1, 0, 33] = True
    words = ops.fdb_pack(planes, torch.ones(2, 1, 1)).planes
    assert words.dtype == torch.int32
    assert words.tolist() == [[[1 + 32 - 2**31, 1, 1 << 5]], [[0, 2, 0]]]


@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_what_is_packed_comes_back(rows, columns, group):
    planes, alpha = problem(rows, columns, group)
    packed = ops.fdb_pack(planes, alpha)
    again, scales = ops.fdb_unpack(packed)
    assert torch.equal(again, planes)
    assert torch.equal(scales, alpha)
    assert packed.shape == (rows, columns)
    assert packed.group_size == group
    # Beyond the last column there is nothing.
    padding = 32 * packed.planes.shape[2] - columns
    beyond = packed.planes[..., -1].long() % 2**32 >> (32 - padding)
    assert not beyond.any()


@pytest.mark.parametrize("bit", [False, True])
def test_planes_of_one_value(bit):
    planes = torch.full((2, 3, 64), bit)
    packed = ops.fdb_pack(planes, torch.tensor([2.0, -0.5]).view(2, 1, 1).expand(2, 3, 2))
    assert packed.planes.unique().tolist() == [-1 if bit else 0]
    x = inputs(4, 64)
    expected = 1.5 * bit * x.double().sum(1, keepdim=True).expand(4, 3)
    torch.testing.assert_close(ops.fdb_matmul(x, packed).double(), expected, rtol=0, atol=1e-5)


# Products -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
@pytest.mark.parametrize("m", [1, 3])
def test_integers_are_exact(rows, columns, group, m):
    planes, alpha = problem(rows, columns, group, integers=True)
    x = inputs(m, columns, integers=True)
    y = ops.fdb_matmul(x, ops.fdb_pack(planes, alpha.half()))
    torch.testing.assert_close(y.double(), by_hand(x, planes, alpha), **EXACTLY)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_within_its_rounding(m, dtype):
    planes, alpha = problem(9, 130, 65)
    alpha = alpha.half()
    x, bias = inputs(m, 130, dtype=dtype), torch.linspace(-1, 1, 9).to(dtype)
    y = ops.fdb_matmul(x, ops.fdb_pack(planes, alpha), bias)
    assert y.dtype == dtype
    exact = by_hand(x, planes, alpha) + bias.double()
    size = by_hand(x.abs(), planes, alpha.abs()) + bias.double().abs()
    sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    allowed = 4 * sums * 130**0.5 * size + torch.finfo(dtype).eps * exact.abs()
    assert ((y.double() - exact).abs() <= allowed).all()


def test_axes_before_the_last_stay():
    packed = ops.fdb_pack(*problem(5, 64, 32))
    x = inputs(6, 64)
    y = ops.fdb_matmul(x, packed)
    torch.testing.assert_close(ops.fdb_matmul(x.view(2, 3, 64), packed), y.view(2, 3, 5), **EXACTLY)
    torch.testing.assert_close(ops.fdb_matmul(x[0], packed), y[0])
    transposed = inputs(64, 6).T
    torch.testing.assert_close(
        ops.fdb_matmul(transposed, packed), ops.fdb_matmul(transposed.contiguous(), packed)
    )


def test_no_rows():
    packed = ops.fdb_pack(*problem(5, 64, 32))
    x = torch.zeros(2, 0, 64, requires_grad=True)
    y = ops.fdb_matmul(x, packed)
    assert y.shape == (2, 0, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape


# Gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 13, 39])
def test_gradients_are_those_of_differences(group):
    planes, alpha = problem(4, 39, group, dtype=torch.float64)
    words = ops.fdb_pack(planes, alpha).planes
    x = inputs(3, 39, dtype=torch.float64)

    def product(x, alpha, bias):
        return ops.fdb_matmul(x, ops.FDBPacked(words, alpha, 39), bias)

    arguments = [x, alpha, torch.randn(4, dtype=torch.float64)]
    assert torch.autograd.gradcheck(product, [each.requires_grad_() for each in arguments])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dense_weight(dtype):
    """da_p[n, g] is the sum of dW = dy^T x over the ones of plane p."""
    planes, alpha = problem(6, 96, 32)
    alpha = alpha.half().requires_grad_()
    x = inputs(5, 96, dtype=dtype).requires_grad_()
    bias = torch.zeros(6, dtype=dtype, requires_grad=True)
    upstream = inputs(5, 6, seed=3, dtype=dtype)
    ops.fdb_matmul(x, ops.fdb_pack(planes, alpha), bias).backward(upstream)

    groups = planes.unflatten(2, (3, 32)).double()
    weight = (groups * alpha.detach().double()[..., None]).sum(0).flatten(1)
    of_weight = upstream.double().T @ x.detach().double()
    expected = (of_weight.unflatten(1, (3, 32)) * groups).sum(-1)
    close = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), upstream.double() @ weight, **close)
    torch.testing.assert_close(alpha.grad.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bias.grad.double(), upstream.double().sum(0), **close)
    assert x.grad.dtype == bias.grad.dtype == dtype
    assert alpha.grad.dtype == torch.float16


def test_only_what_is_asked_for_is_made(monkeypatch):
    asked, made = [], fdb_reference.gradient

    def gradient(*arguments):
        found = made(*arguments)
        asked.append(tuple(each is not None for each in found))
        return found

    monkeypatch.setattr(fdb_reference, "gradient", gradient)
    packed = ops.fdb_pack(*problem(5, 64, 32))
    x = inputs(2, 64).requires_grad_()
    ops.fdb_matmul(x, packed).sum().backward()
    bias = torch.zeros(5, requires_grad=True)
    ops.fdb_matmul(x.detach(), packed, bias).sum().backward()
    learning = ops.FDBPacked(packed.planes, packed.alpha.clone().requires_grad_(), 64)
    ops.fdb_matmul(x.detach(), learning).sum().backward()
    assert asked == [(True, False), (False, True)]


def test_a_second_derivative_is_refused():
    x = inputs(2, 64).requires_grad_()
    y = ops.fdb_matmul(x, ops.fdb_pack(*problem(5, 64, 32)))
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_it_compiles_without_a_break():
    packed = ops.fdb_pack(*problem(5, 64, 32))
    compiled = torch.compile(ops.fdb_matmul, fullgraph=True, backend="aot_eager")
    x = inputs(3, 64).requires_grad_()
    slopes = []
    for function in (ops.fdb_matmul, compiled):
        y = function(x, packed)
        slopes.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for mine, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, theirs)


# Bad input ----------------------------------------------------------------------------------------


def packing(**changes):
    arguments = {"planes": torch.zeros(2, 3, 64, dtype=torch.bool), "alpha": torch.zeros(2, 3, 2)}
    return ops.fdb_pack(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"planes": torch.zeros(2, 3, 64)}, TypeError, "bool"),
        ({"planes": torch.zeros(3, 3, 64, dtype=torch.bool)}, ValueError, r"\[2, N, K\]"),
        ({"planes": torch.zeros(3, 64, dtype=torch.bool)}, ValueError, r"\[2, N, K\]"),
        ({"alpha": torch.zeros(2, 4, 2)}, ValueError, r"\[2, 3, K / G\]"),
        ({"alpha": torch.zeros(2, 3)}, ValueError, r"\[2, 3, K / G\]"),
        ({"alpha": torch.zeros(2, 3, 5)}, ValueError, "64 columns .* 5 groups"),
        ({"alpha": torch.zeros(2, 3, 0)}, ValueError, "64 columns .* 0 groups"),
        ({"alpha": torch.full((2, 3, 2), torch.inf)}, ValueError, "not finite"),
        ({"alpha": torch.full((2, 3, 2), torch.nan)}, ValueError, "not finite"),
        ({"alpha": torch.zeros(2, 3, 2, dtype=torch.int64)}, TypeError, "alpha must be float32"),
    ],
)
def test_what_cannot_be_packed(changes, error, message):
    with pytest.raises(error, match=message) as raised:
        packing(**changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 64, dtype=torch.int32),), TypeError, "x must be float32"),
        ((torch.zeros(2, 63),), ValueError, r"\[\.\.\., 64\], got \(2, 63\)"),
        ((torch.tensor(1.0),), ValueError, r"\[\.\.\., 64\]"),
        ((torch.zeros(2, 64), torch.zeros(4)), ValueError, r"bias must be \[3\]"),
        ((torch.zeros(2, 64), torch.zeros(3, dtype=torch.int8)), TypeError, "bias must be float32"),
        ((torch.zeros(2, 64, device="meta"),), ValueError, "x is on meta"),
    ],
)
def test_what_cannot_be_multiplied(arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        ops.fdb_matmul(arguments[0], packing(), *arguments[1:])
    assert "\n" not in str(raised.value)


def test_a_weight_that_is_not_packed():
    with pytest.raises(TypeError, match="fdb_pack, got Tensor"):
        ops.fdb_matmul(torch.zeros(2, 64), torch.zeros(3, 64))
    words = torch.zeros(2, 3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\[2, N, 3\], got \(2, 3, 2\)"):
        ops.FDBPacked(words, torch.zeros(2, 3, 1), 65)
    with pytest.raises(TypeError, match="int32, got torch.int64"):
        ops.FDBPacked(words.long(), torch.zeros(2, 3, 1), 64)
    with pytest.raises(ValueError, match="alpha on meta"):
        ops.FDBPacked(words, torch.zeros(2, 3, 1, device="meta"), 64)
