"""Gradients of products with dual-binary weights, and the ops as a compiler sees them."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from stillhouse import ops
from stillhouse.ops import divergence_autograd, fdb_autograd

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 31, 31), (3, 33, 1), (17, 39, 13), (7, 130, 65), (37, 257, 257), (64, 160, 32)]


def of_scales(of_weight, planes, group):
    return (of_weight * planes).unflatten(2, (-1, group)).sum(-1)


@pytest.mark.parametrize("group", [1, 13, 39])
def test_gradients_are_those_of_differences(level, group, dual_binary):
    planes, alpha = dual_binary.weight(18, 39, group, dtype=torch.float64)
    words = ops.fdb_pack(planes, alpha).planes
    x = dual_binary.draw(3, 39, seed=3, dtype=torch.float64)
    bias = dual_binary.draw(18, seed=4, dtype=torch.float64)

    def product(x, alpha, bias):
        return ops.fdb_matmul(x, ops.FDBPacked.from_words(words, alpha, 39), bias)

    arguments = [each.requires_grad_() for each in (x, alpha, bias)]
    assert torch.autograd.gradcheck(product, arguments, fast_mode=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_dense_weight(level, shape, dtype, dual_binary):
    """da_p[n, g] is the sum of dW = dy^T x over the ones of plane p."""
    rows, columns, group = shape
    for m in (1, 3, 16, 50):
        planes, alpha = dual_binary.weight(*shape, dtype=torch.float32)
        x = dual_binary.draw(m, columns, seed=m, dtype=dtype)
        upstream = dual_binary.draw(m, rows, seed=m + 1, dtype=dtype)
        bias = dual_binary.draw(rows, seed=4, dtype=dtype)
        arguments = [each.requires_grad_() for each in (x, alpha, bias)]
        y = ops.fdb_matmul(x, ops.fdb_pack(planes, alpha), bias)
        d_x, d_alpha, d_bias = torch.autograd.grad(y, arguments, upstream)
        assert d_x.dtype == d_bias.dtype == dtype
        assert d_alpha.dtype == torch.float32

        back, x, parts = upstream.double(), x.detach().double(), dual_binary.dense(planes, alpha)
        size = back.abs() @ parts.abs().sum(0)
        dual_binary.assert_rounded(d_x, back @ parts.sum(0), size, rows, dtype)

        size = of_scales(back.abs().T @ x.abs(), planes, group)
        exact = of_scales(back.T @ x, planes, group)
        # Scales are float32 whatever rows are.
        sums = torch.float32 if dtype == torch.float64 else dtype
        dual_binary.assert_rounded(d_alpha, exact, size, m * group, sums)
        dual_binary.assert_rounded(d_bias, back.sum(0), back.abs().sum(0), m, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_of_integers_are_exact(level, dtype, dual_binary):
    planes, alpha = dual_binary.weight(37, 130, 65, integers=True)
    for m in (1, 5):
        x = dual_binary.draw(m, 130, seed=m, dtype=dtype, integers=True)
        upstream = dual_binary.draw(m, 37, seed=m + 1, dtype=dtype, integers=True)
        packed = ops.fdb_pack(planes, alpha)
        parts = packed.tiles, packed.scales
        d_x, d_scales = divergence_autograd.kernels().fdb_gradient(upstream, x, *parts, True, True)
        exact = of_scales(upstream.double().T @ x.double(), planes, 65)
        found = ops.FDBPacked(packed.tiles, d_scales, 37, 130).alpha
        assert torch.equal(found.double(), exact)
        assert not d_scales[2, :, :, 5:].any()
        dense = dual_binary.dense(planes, alpha).sum(0)
        assert torch.equal(d_x, (upstream.double() @ dense).to(dtype))


def test_gradients_have_the_dtype_of_what_they_are_of(level, dual_binary):
    planes, alpha = dual_binary.weight(5, 64, 32)
    x = dual_binary.draw(2, 3, 64, seed=3, dtype=torch.bfloat16).requires_grad_()
    bias = torch.zeros(5, dtype=torch.float16, requires_grad=True)
    y = ops.fdb_matmul(x, ops.fdb_pack(planes, alpha.requires_grad_()), bias)
    y.sum().backward()
    assert y.shape == (2, 3, 5)
    assert (x.grad.shape, x.grad.dtype) == (x.shape, torch.bfloat16)
    assert (alpha.grad.shape, alpha.grad.dtype) == (alpha.shape, torch.float16)
    assert bias.grad.dtype == torch.float16
    assert bias.grad.tolist() == [6] * 5


def test_no_rows_have_gradients(level, dual_binary):
    planes, alpha = dual_binary.weight(5, 64, 32)
    x = torch.zeros(2, 0, 64, requires_grad=True)
    ops.fdb_matmul(x, ops.fdb_pack(planes, alpha.requires_grad_())).sum().backward()
    assert x.grad.shape == x.shape
    assert not alpha.grad.any()


def test_only_what_is_asked_for_is_made(dual_binary, monkeypatch):
    asked, made = [], fdb_autograd.gradient

    def gradient(*arguments):
        asked.append(arguments[-2:])
        return made(*arguments)

    monkeypatch.setattr(fdb_autograd, "gradient", gradient)
    planes, alpha = dual_binary.weight(5, 64, 32)
    packed = ops.fdb_pack(planes, alpha)
    x = dual_binary.draw(2, 64, seed=3).requires_grad_()
    ops.fdb_matmul(x, packed).sum().backward()
    bias = torch.zeros(5, requires_grad=True)
    ops.fdb_matmul(x.detach(), packed, bias).sum().backward()
    ops.fdb_matmul(x.detach(), ops.fdb_pack(planes, alpha.requires_grad_())).sum().backward()
    assert asked == [(True, False), (False, True)]
    with torch.no_grad():
        assert ops.fdb_matmul(x, packed, bias).grad_fn is None
    d_x, d_scales = divergence_autograd.kernels().fdb_gradient(
        torch.ones(2, 5), x.detach(), packed.tiles, packed.scales, False, False
    )
    assert d_x.shape == d_scales.shape == (0,)


def test_a_second_derivative_is_refused(level, dual_binary):
    packed = ops.fdb_pack(*dual_binary.weight(5, 64, 32))
    x = dual_binary.draw(2, 64, seed=3).requires_grad_()
    (slope,) = torch.autograd.grad(ops.fdb_matmul(x, packed).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
    op = divergence_autograd.kernels().fdb_gradient
    d_x, _ = op(torch.ones(2, 5), x, packed.tiles, packed.scales, True, False)
    with pytest.raises(RuntimeError, match="no second derivative"):
        d_x.sum().backward()


# Compilers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(kernels, dtype, dual_binary):
    ops_of = divergence_autograd.kernels()
    packed = ops.fdb_pack(*dual_binary.weight(18, 130, 65))
    parts = packed.tiles, packed.scales
    x = dual_binary.draw(3, 130, seed=3, dtype=dtype)
    upstream = dual_binary.draw(3, 18, seed=4, dtype=dtype)
    check = torch.library.opcheck
    for bias in (None, dual_binary.draw(18, seed=5, dtype=dtype)):
        check(ops_of.fdb_matmul.default, (x, *parts, bias, 18))
    for wanted in ((True, True), (True, False), (False, True)):
        check(ops_of.fdb_gradient.default, (upstream, x, *parts, *wanted))
    check(ops_of.fdb_dequantize.default, (*parts, 18, 130, dtype))
    if dtype == torch.float64:
        return
    check(ops_of.fdb_quantize.default, (x, 2))
    made = ops_of.fdb_quantize(x, 2)
    check(ops_of.fdb_matmul_int8.default, (*made, *parts, None, 18, dtype))


def test_opcheck_of_huge_pages():
    op = torch.ops.stillhouse.in_huge_pages.default
    for x in (torch.zeros(3, 5, dtype=torch.int32), torch.zeros(4, 6).T):
        torch.library.opcheck(op, (x,))
        assert op(x).is_contiguous()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_it_compiles_without_a_break(device, backend, dual_binary):
    planes, alpha = dual_binary.weight(5, 64, 32)
    words = ops.fdb_pack(planes, alpha).planes

    def product(x, alpha, bias):
        return ops.fdb_matmul(x, ops.FDBPacked.from_words(words, alpha, 64), bias)

    torch._dynamo.reset()
    compiled = torch.compile(product, fullgraph=True, dynamic=True, backend=backend)
    bias, alpha = torch.zeros(5, requires_grad=True), alpha.requires_grad_()
    for m in (3, 4, 7):
        x = dual_binary.draw(m, 64, seed=m).requires_grad_()
        found = []
        for function in (compiled, product):
            y = function(x, alpha, bias)
            found.append((y, *torch.autograd.grad(y.square().sum(), (x, alpha, bias))))
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_other_rows_do_not_recompile(device, dual_binary):
    packed = ops.fdb_pack(*dual_binary.weight(5, 64, 32))

    def step(x):
        with torch.no_grad():
            rows = ops.fdb_quantize(x, 32)
        return ops.fdb_matmul(x, packed) + ops.fdb_matmul(rows, packed)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for m in range(9, 14):  # no size of the weight, which would be taken for the same
        x = dual_binary.draw(m, 3, 64, seed=m)
        torch.testing.assert_close(compiled(x), step(x))
    assert counter.frame_count == 1
