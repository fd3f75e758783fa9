"""Products with dual-binary weights against float64, integers and the sum by hand."""

import ctypes
import mmap
import os
import traceback

import pytest
import torch

from stillhouse import ops
from stillhouse.ops import divergence_autograd

PROT_NONE = 0
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Rows of W that fill a block or not, groups that are words or not.
SHAPES = [
    (1, 31, 31),
    (3, 33, 1),
    (16, 128, 128),
    (17, 39, 13),
    (7, 130, 65),
    (37, 257, 257),
    (64, 160, 32),
    (100, 512, 64),
]
ROWS = [1, 2, 3, 4, 7, 8, 16, 33]


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


# Floats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns", "group"), [(5, 96, 32), (7, 130, 65), (17, 39, 13)])
def test_sums_by_hand(level, rows, columns, group, dual_binary):
    planes, alpha = dual_binary.weight(rows, columns, group)
    x = dual_binary.draw(3, columns, seed=3)
    exact = by_hand(x, planes, alpha)
    found = ops.fdb_matmul(x, ops.fdb_pack(planes, alpha))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dual_binary.product(x, planes, alpha)[0], exact)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_exact(level, shape, dtype, dual_binary):
    planes, alpha = dual_binary.weight(*shape, integers=True)
    packed = ops.fdb_pack(planes, alpha)
    for m in ROWS:
        x = dual_binary.draw(m, shape[1], seed=m, dtype=dtype, integers=True)
        exact, _ = dual_binary.product(x, planes, alpha)
        assert torch.equal(ops.fdb_matmul(x, packed), exact.to(dtype)), m


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_dtype_within_its_rounding(level, shape, dtype, dual_binary):
    planes, alpha = dual_binary.weight(*shape)
    packed = ops.fdb_pack(planes, alpha)
    bias = dual_binary.draw(shape[0], seed=9, dtype=dtype)
    for m in ROWS:
        x = dual_binary.draw(m, shape[1], seed=m, dtype=dtype)
        y = ops.fdb_matmul(x, packed, bias)
        assert y.dtype == dtype
        expected = dual_binary.product(x, planes, alpha, bias)
        dual_binary.assert_rounded(y, *expected, shape[1], dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_many_rows(level, dtype, dual_binary):
    planes, alpha = dual_binary.weight(48, 256, 128)
    x = dual_binary.draw(256, 256, seed=3, dtype=dtype)
    y = ops.fdb_matmul(x, ops.fdb_pack(planes, alpha))
    dual_binary.assert_rounded(y, *dual_binary.product(x, planes, alpha), 256, dtype)


@pytest.mark.parametrize("scales", FLOATS)
def test_scales_and_bias_of_every_dtype(level, scales, dual_binary):
    planes, alpha = dual_binary.weight(37, 130, 65, dtype=scales)
    packed = ops.fdb_pack(planes, alpha)
    for m in (1, 33):
        for dtype in (torch.float32, torch.bfloat16):
            x = dual_binary.draw(m, 130, seed=3, dtype=dtype)
            for of_bias in FLOATS:
                bias = dual_binary.draw(37, seed=4, dtype=of_bias)
                expected = dual_binary.product(x, planes, alpha, bias)
                y = ops.fdb_matmul(x, packed, bias)
                dual_binary.assert_rounded(y, *expected, 130, dtype)


@pytest.mark.parametrize("bit", [False, True])
def test_planes_of_one_value(level, bit):
    planes = torch.full((2, 19, 70), bit)
    alpha = torch.tensor([2.0, -0.5]).view(2, 1, 1).expand(2, 19, 2)
    packed = ops.fdb_pack(planes, alpha)
    x = torch.arange(4 * 70).remainder(9).sub(4).float().view(4, 70)
    expected = (1.5 * bit * x.sum(1, keepdim=True)).expand(4, 19)
    assert torch.equal(ops.fdb_matmul(x, packed), expected)
    assert torch.equal(ops.fdb_matmul(x[:1], packed), expected[:1])
    made = ops.FDBActivations(x.to(torch.int8), torch.ones(4, 2), torch.float32)
    assert torch.equal(ops.fdb_matmul(made, packed), expected)


def test_axes_before_the_last_stay(level, dual_binary):
    packed = ops.fdb_pack(*dual_binary.weight(5, 64, 32))
    x = dual_binary.draw(6, 64, seed=3)
    y = ops.fdb_matmul(x, packed)
    assert torch.equal(ops.fdb_matmul(x.view(2, 3, 64), packed), y.view(2, 3, 5))
    torch.testing.assert_close(ops.fdb_matmul(x[0], packed), y[0])
    turned = dual_binary.draw(64, 6, seed=4).T
    assert torch.equal(ops.fdb_matmul(turned, packed), ops.fdb_matmul(turned.contiguous(), packed))
    with torch.no_grad():
        rows = ops.fdb_quantize(x.view(2, 3, 64), 32)
        y = ops.fdb_matmul(ops.fdb_quantize(x, 32), packed)
        assert torch.equal(ops.fdb_matmul(rows, packed), y.view(2, 3, 5))


def test_nothing_to_multiply(level, dual_binary):
    packed = ops.fdb_pack(*dual_binary.weight(5, 64, 32))
    x = torch.zeros(2, 0, 64)
    assert ops.fdb_matmul(x, packed).shape == (2, 0, 5)
    assert ops.fdb_matmul(ops.fdb_quantize(x, 32), packed).shape == (2, 0, 5)
    empty = ops.fdb_pack(*dual_binary.weight(0, 64, 32))
    assert ops.fdb_matmul(torch.zeros(3, 64), empty).shape == (3, 0)


def test_what_is_not_finite_stays_in_its_row(level, dual_binary):
    planes, alpha = dual_binary.weight(20, 64, 32)
    planes[:, :, 7] = torch.tensor([True, False])[:, None]
    packed = ops.fdb_pack(planes, alpha)
    x = dual_binary.draw(5, 64, seed=3)
    x[1, 7], x[3, 7] = torch.nan, torch.inf
    for m in (2, 4, 5):
        y = ops.fdb_matmul(x[:m], packed)
        assert not y[1::2].isfinite().any()
        assert y[::2].isfinite().all()


# Rows of 8 bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_8_bits_are_exact(level, shape, dual_binary):
    """Sums of every size that integers have, and scales that are integers too."""
    _, columns, group = shape
    planes, alpha = dual_binary.weight(*shape, integers=True)
    packed = ops.fdb_pack(planes, alpha)
    for m in ROWS:
        values = (dual_binary.draw(m, columns, seed=m) * 90).clamp(-127, 127).to(torch.int8)
        steps = torch.full((m, columns // group), 0.5)
        exact, _ = dual_binary.product(values / 2, planes, alpha)
        for dtype in (torch.float32, torch.bfloat16):
            made = ops.FDBActivations(values, steps, dtype)
            assert torch.equal(ops.fdb_matmul(made, packed), exact.float().to(dtype)), m


def test_the_largest_sums_of_8_bits(level):
    """A long group of 127 or -127 throughout: what 16 bits would not hold."""
    packed = ops.fdb_pack(torch.ones(2, 17, 4096, dtype=torch.bool), torch.ones(2, 17, 1))
    values = torch.tensor([127, -127, -128], dtype=torch.int8)[:, None].expand(3, 4096)
    for m in (1, 3):
        made = ops.FDBActivations(values[:m], torch.ones(m, 1), torch.float32)
        expected = 2 * 4096 * values[:m, :1].float().expand(m, 17)
        assert torch.equal(ops.fdb_matmul(made, packed), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_8_bits_within_rounding(level, shape, dtype, dual_binary):
    planes, alpha = dual_binary.weight(*shape)
    packed = ops.fdb_pack(planes, alpha)
    bias = dual_binary.draw(shape[0], seed=9, dtype=dtype)
    for m in ROWS:
        made = ops.fdb_quantize(dual_binary.draw(m, shape[1], seed=m, dtype=dtype), shape[2])
        numbers = made.values.unflatten(1, (-1, shape[2])).double() * made.steps.double()[..., None]
        expected = dual_binary.product(numbers.flatten(1), planes, alpha, bias)
        y = ops.fdb_matmul(made, packed, bias)
        assert y.dtype == dtype
        dual_binary.assert_rounded(y, *expected, shape[1], dtype)


# Order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 3, 8, 15, 70])
@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_and_repetition_change_no_bit(level, m, dtype, dual_binary):
    """Of many rows of floats, which go through torch's own products, repetition alone."""
    packed = ops.fdb_pack(*dual_binary.weight(200, 1024, 64))
    x = dual_binary.draw(m, 1024, seed=3, dtype=dtype)
    upstream = dual_binary.draw(m, 200, seed=4, dtype=dtype)
    kernels = divergence_autograd.kernels()
    floats, integers, slopes, before = [], [], [], torch.get_num_threads()
    try:
        for count in (1, 1, 2, 2):
            torch.set_num_threads(count)
            floats.append(ops.fdb_matmul(x, packed))
            slopes.append(
                kernels.fdb_gradient(upstream, x, packed.tiles, packed.scales, True, True)
            )
            if dtype != torch.float64:
                made = ops.fdb_quantize(x, 64)
                integers.append((made.values, made.steps, ops.fdb_matmul(made, packed)))
    finally:
        torch.set_num_threads(before)
    for one, two in ((0, 1), (2, 3)):
        assert torch.equal(floats[one], floats[two])
        assert all(map(torch.equal, slopes[one], slopes[two]))
    assert m >= 16 or torch.equal(floats[0], floats[2])
    for other in integers[1:]:
        assert all(map(torch.equal, integers[0], other))


# Memory -------------------------------------------------------------------------------------------


def at_the_end(x, maps):
    """A copy whose last number is followed by a page that must not be read."""
    size, page = x.numel() * x.element_size(), mmap.PAGESIZE
    held = -(-size // page) * page
    memory = mmap.mmap(-1, held + page)
    maps.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + held), page, PROT_NONE)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=held - size)
    return copy.view(x.shape).copy_(x)


def multiply_at_the_end(dual_binary, shape, dtype, maps):
    planes, alpha = dual_binary.weight(*shape)
    packed = ops.fdb_pack(planes, alpha)
    held = [at_the_end(each, maps) for each in (packed.tiles, packed.scales)]
    bias = at_the_end(dual_binary.draw(shape[0], seed=9, dtype=dtype), maps)
    kernels = divergence_autograd.kernels()
    for m in (1, 2, 3, 7, 17, 50):
        x = at_the_end(dual_binary.draw(m, shape[1], seed=m, dtype=dtype), maps)
        upstream = at_the_end(dual_binary.draw(m, shape[0], seed=m, dtype=dtype), maps)
        kernels.fdb_matmul(x, *held, bias, shape[0])
        kernels.fdb_gradient(upstream, x, *held, True, True)
        made = [at_the_end(each, maps) for each in kernels.fdb_quantize(x, alpha.shape[2])]
        kernels.fdb_matmul_int8(*made, *held, bias, shape[0], dtype)
    kernels.fdb_dequantize(*held, shape[0], shape[1], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_read_past_the_end(level, dtype, dual_binary):
    """In a process of its own, which such a read would end."""
    if level == "cuda":
        pytest.skip("a page of the CPU's")
    child = os.fork()
    if not child:
        status = 1
        try:
            torch.set_num_threads(1)  # threads do not survive a fork
            maps = []
            for shape in SHAPES:
                multiply_at_the_end(dual_binary, shape, dtype, maps)
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
