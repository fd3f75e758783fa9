"""Dual-binary weights in the shapes that make CUDA choose each of its kernels."""

import pytest
import torch

from stillhouse.ops import divergence_autograd, fdb_reference

pytestmark = pytest.mark.parametrize(
    "kernels", ["simt", "cuda"], indirect=True, ids=["kernels-simt", "kernels-cuda"]
)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Rows of x on either side of every choice.
ROWS = [1, 2, 3, 7, 9, 17, 65, 130]
# N, K, G: blocks and tiles that are full or not, groups that are words or not, one long group.
SHAPES = [(16, 256, 128), (37, 130, 65), (130, 192, 64), (70, 600, 600), (3, 33, 1)]


def draw(*shape, seed, integers=False, dtype=torch.float32):
    generator = torch.Generator("cpu").manual_seed(seed)
    if integers:
        drawn = torch.randint(-4, 5, shape, generator=generator, device="cpu")
    else:
        drawn = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)
    return drawn.to(torch.get_default_device(), dtype)


class Weight:
    """Bits and scales [2, N, K / G], as kernels have them and as float64 [2, N, K]."""

    def __init__(self, rows, columns, group, integers=False, dtype=torch.float16):
        self.rows, self.columns, self.group = rows, columns, group
        groups, blocks, words = columns // group, -(-rows // 16), -(-group // 32)
        self.planes = draw(2, rows, columns, seed=1) > 0.4
        alpha = draw(2, rows, groups, seed=2, integers=integers, dtype=dtype)
        bits = torch.zeros(2, blocks * 16, groups, words * 32, dtype=torch.bool)
        bits[:, :rows, :, :group] = self.planes.unflatten(2, (groups, group))
        bits = fdb_reference.pack(bits.flatten(1, 2)).view(2, blocks, 16, groups, words)
        self.tiles = bits.permute(1, 3, 4, 0, 2).contiguous()
        scales = torch.zeros(2, blocks * 16, groups, dtype=dtype)
        scales[:, :rows] = alpha
        self.scales = scales.view(2, blocks, 16, groups).permute(1, 3, 0, 2).contiguous()
        spread = alpha.double().repeat_interleave(group, 2)
        self.parts = self.planes * spread

    def untiled(self, scales):
        """[2, N, g] of what has the layout of the scales."""
        return scales.permute(2, 0, 3, 1).flatten(1, 2)[:, : self.rows]


def assert_near(found, exact, size, terms, dtype):
    sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    allowed = 4 * sums * terms**0.5 * size + 1e-30
    if dtype.itemsize == 2:
        allowed = allowed + torch.finfo(dtype).eps / 2 * (size + exact.abs())
        allowed = allowed + torch.finfo(dtype).smallest_normal
    gap = (found.double() - exact).abs()
    assert (gap <= allowed).all(), (gap - allowed).max().item()


def kernel(name):
    return getattr(divergence_autograd.kernels(), name)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products(kernels, shape, dtype):
    exact, rounded = Weight(*shape, integers=True), Weight(*shape, dtype=torch.float32)
    bias = draw(shape[0], seed=9)
    for m in ROWS:
        x = draw(m, shape[1], seed=m, integers=True, dtype=dtype)
        y = kernel("fdb_matmul")(x, exact.tiles, exact.scales, None, shape[0])
        assert torch.equal(y, (x.double() @ exact.parts.sum(0).T).to(dtype)), m
        x = draw(m, shape[1], seed=m, dtype=dtype)
        y = kernel("fdb_matmul")(x, rounded.tiles, rounded.scales, bias, shape[0])
        size = x.double().abs() @ rounded.parts.abs().sum(0).T + bias.double().abs()
        expected = x.double() @ rounded.parts.sum(0).T + bias.double()
        assert_near(y, expected, size, shape[1], dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(kernels, shape, dtype):
    rows, columns, group = shape
    for integers in (True, False):
        weight = Weight(*shape, integers=integers)
        for m in (1, 16, 33, 70):
            x = draw(m, columns, seed=m, integers=integers, dtype=dtype)
            back = draw(m, rows, seed=m + 1, integers=integers, dtype=dtype)
            parts = weight.tiles, weight.scales
            d_x, d_scales = kernel("fdb_gradient")(back, x, *parts, True, True)
            again = kernel("fdb_gradient")(back, x, *parts, True, True)
            assert torch.equal(d_x, again[0])
            assert torch.equal(d_scales, again[1])
            exact = back.double() @ weight.parts.sum(0)
            size = back.double().abs() @ weight.parts.abs().sum(0)
            of_weight = back.double().T @ x.double()
            of_scales = (of_weight * weight.planes).unflatten(2, (-1, group)).sum(-1)
            of_sizes = back.double().abs().T @ x.double().abs()
            of_sizes = (of_sizes * weight.planes).unflatten(2, (-1, group)).sum(-1)
            if integers:
                assert torch.equal(d_x, exact.to(dtype))
                assert torch.equal(weight.untiled(d_scales).double(), of_scales)
                assert not d_scales.permute(2, 0, 3, 1).flatten(1, 2)[:, rows:].any()
            assert_near(d_x, exact, size, rows, dtype)
            sums = torch.float64 if dtype == torch.float64 else torch.float32
            assert_near(weight.untiled(d_scales), of_scales, of_sizes, m * group, sums)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_of_the_weight(kernels, shape, dtype):
    rows, columns, _ = shape
    weight = Weight(*shape, dtype=torch.float32)
    found = kernel("fdb_dequantize")(weight.tiles, weight.scales, rows, columns, dtype)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(found, weight.parts.to(sums).sum(0).to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_8_bits(kernels, shape):
    rows, columns, group = shape
    exact, rounded = Weight(*shape, integers=True), Weight(*shape, dtype=torch.bfloat16)
    bias = draw(rows, seed=9, dtype=torch.float16)
    for m in ROWS:
        x = (draw(m, columns, seed=m) * 60).clamp(-127, 127).to(torch.int8)
        steps = draw(m, columns // group, seed=m + 1).abs()
        half = torch.full_like(steps, 0.5)
        parts = exact.tiles, exact.scales
        y = kernel("fdb_matmul_int8")(x, half, *parts, None, rows, torch.float32)
        assert torch.equal(y.double(), x.double() / 2 @ exact.parts.sum(0).T), m
        parts = rounded.tiles, rounded.scales
        numbers = x.double() * steps.double().repeat_interleave(group, 1)
        size = numbers.abs() @ rounded.parts.abs().sum(0).T + bias.double().abs()
        expected = numbers @ rounded.parts.sum(0).T + bias.double()
        for dtype in FLOATS[1:]:
            y = kernel("fdb_matmul_int8")(x, steps, *parts, bias, rows, dtype)
            assert_near(y, expected, size, columns, dtype)


@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("group", [1, 13, 40, 520])
def test_rounding_to_8_bits(kernels, group, dtype):
    x = draw(9, 520, seed=3, dtype=dtype)
    x[1, :group] = 0
    x[2, 0], x[3, 0] = torch.nan, torch.inf
    integers, steps = kernel("fdb_quantize")(x, 520 // group)
    bad = ~x.float().unflatten(1, (-1, group)).isfinite().all(-1)
    assert torch.equal(steps.isnan(), bad)
    known = torch.where(bad, 0, x.double().unflatten(1, (-1, group)).abs().amax(-1) / 127)
    torch.testing.assert_close(torch.where(bad, 0, steps).double(), known, rtol=1e-6, atol=0)
    spread = known.repeat_interleave(group, 1)
    off = torch.where(spread > 0, integers * spread - x.double(), 0).abs()
    assert (off <= 0.5001 * spread).all()
    assert not integers[spread == 0].any()
