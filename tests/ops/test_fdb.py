"""Dual-binary weights as kernels read them, rows of 8 bits, and what is refused."""

import pytest
import torch

from stillhouse import ops
from stillhouse.ops import divergence_autograd, fdb_reference

SHAPES = [(5, 96, 32), (16, 128, 128), (7, 130, 65), (1, 31, 31), (3, 33, 1), (33, 64, 64)]

# Words and tiles ----------------------------------------------------------------------------------


def test_bit_k_of_word_k_over_32_lowest_first():
    planes = torch.zeros(2, 1, 70, dtype=torch.bool)
    planes[0, 0, [0, 5, 31, 32, 69]] = True
    planes[1, 0, 33] = True
    words = ops.fdb_pack(planes, torch.ones(2, 1, 1)).planes
    assert words.dtype == torch.int32
    assert words.tolist() == [[[1 + 32 - 2**31, 1, 1 << 5]], [[0, 2, 0]]]


def test_tiles_by_hand():
    """17 rows, two groups of 34 columns: each group begins a word, each block 16 rows."""
    planes = torch.zeros(2, 17, 68, dtype=torch.bool)
    places = [(0, 0, 0), (1, 0, 33), (0, 3, 34), (1, 16, 67), (0, 16, 65)]
    for place in places:
        planes[place] = True
    alpha = torch.arange(2 * 17 * 2, dtype=torch.float16).view(2, 17, 2) + 1
    packed = ops.fdb_pack(planes, alpha)
    assert packed.tiles.shape == (2, 2, 2, 2, 16)
    expected = torch.zeros(2, 2, 2, 2, 16, dtype=torch.int32)
    expected[0, 0, 0, 0, 0] = 1
    expected[0, 0, 1, 1, 0] = 1 << 1
    expected[0, 1, 0, 0, 3] = 1
    expected[1, 1, 1, 1, 0] = 1 << 1
    expected[1, 1, 0, 0, 0] = -(1 << 31)
    assert torch.equal(packed.tiles, expected)
    assert packed.scales.shape == (2, 2, 2, 16)
    for block, group, plane, row in ((0, 1, 0, 15), (1, 0, 1, 0), (0, 0, 1, 7)):
        found = packed.scales[block, group, plane, row]
        assert found == alpha[plane, 16 * block + row, group]
    assert not packed.scales[1, ..., 1:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "columns", "group"), [*SHAPES, (0, 64, 32)])
def test_what_is_packed_comes_back(rows, columns, group, dtype, dual_binary, device):
    planes, alpha = dual_binary.weight(rows, columns, group, dtype=dtype)
    packed = ops.fdb_pack(planes, alpha)
    again, scales = ops.fdb_unpack(packed)
    assert torch.equal(again, planes)
    assert torch.equal(scales, alpha)
    assert torch.equal(packed.alpha, alpha)
    assert packed.scales.dtype == dtype
    assert packed.shape == (rows, columns)
    assert packed.group_size == group
    words = packed.planes
    assert torch.equal(words, fdb_reference.pack(planes))
    assert words.is_contiguous()
    for given in (words, with_bits_beyond(words, columns)):
        of_words = ops.FDBPacked.from_words(given, alpha, columns)
        assert torch.equal(of_words.tiles, packed.tiles)
        assert torch.equal(of_words.scales, packed.scales)
        assert of_words.tiles.is_contiguous()


def with_bits_beyond(words, columns):
    """The last words with ones beyond the last column."""
    words = words.clone()
    if columns % 32:
        words[..., -1] |= -1 << columns % 32
    return words


def test_the_weight_as_numbers(level, dual_binary):
    for shape in [*SHAPES, (0, 64, 32)]:
        planes, alpha = dual_binary.weight(*shape)
        packed = ops.fdb_pack(planes, alpha)
        exact = dual_binary.dense(planes, alpha).sum(0)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            rounded = exact if dtype == torch.float64 else exact.float().to(dtype)
            assert torch.equal(packed.dequantize(dtype), rounded.to(dtype))


def test_gradients_reach_alpha_through_the_tiles(dual_binary):
    planes, alpha = dual_binary.weight(17, 64, 32, dtype=torch.float64)
    packed = ops.fdb_pack(planes, alpha.requires_grad_())
    upstream = dual_binary.draw(*packed.scales.shape, seed=5, dtype=torch.float64)
    (found,) = torch.autograd.grad(packed.scales, alpha, upstream)
    assert torch.equal(found, fdb_reference.untile_scales(upstream, 17))
    assert not packed.dequantize().requires_grad


# Rows of 8 bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_8_bits(level, dtype, dual_binary):
    for shape, group in (
        ((5, 96), 32),
        ((3, 2, 130), 65),
        ((0, 64), 64),
        ((33,), 1),
        ((9, 39), 13),
    ):
        x = dual_binary.draw(*shape, seed=3, dtype=dtype)
        made = ops.fdb_quantize(x, group)
        groups = x.double().unflatten(-1, (-1, group) if x.numel() else (1, 64))
        assert made.values.shape == x.shape
        assert made.values.dtype == torch.int8
        assert made.dtype == dtype
        largest = groups.abs().amax(-1)
        torch.testing.assert_close(made.steps, (largest / 127).float(), rtol=2e-7, atol=0)
        values = made.values.double().unflatten(-1, groups.shape[-2:])
        assert (values.abs().amax(-1) == 127).all()
        # The nearest integer, but for what is half-way within rounding.
        exact = groups / (largest / 127)[..., None]
        assert ((values - exact).abs() <= 0.5 + 1e-4).all()


def test_8_bits_of_what_is_special(level):
    x = torch.zeros(5, 32)
    x[1, 3] = 1e-44  # not a normal number, nor is a 127th of it
    x[2, :4] = torch.tensor([127, 2.5, 3.5, -0.5])  # ties to even
    x[3, 5], x[4, 5] = torch.inf, torch.nan
    made = ops.fdb_quantize(x, 32)
    assert made.steps[0] == 0
    assert not made.values[0].any()
    assert made.values[2, :4].tolist() == [127, 2, 4, 0]
    packed = ops.fdb_pack(torch.ones(2, 3, 32, dtype=torch.bool), torch.ones(2, 3, 1))
    y = ops.fdb_matmul(made, packed)
    assert (y[:2].abs() < 1e-40).all()
    assert y[3:].isnan().all()


# Without a kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_device_without_kernels_gets_plain_torch_and_is_told(shape, dual_binary, monkeypatch):
    planes, alpha = dual_binary.weight(*shape, dtype=torch.float32)
    x = dual_binary.draw(4, shape[1], seed=3).requires_grad_()
    bias = dual_binary.draw(shape[0], seed=4)

    def everything():
        packed = ops.fdb_pack(planes, alpha.requires_grad_())
        y = ops.fdb_matmul(x, packed, bias)
        slopes = torch.autograd.grad(y.square().sum(), (x, alpha))
        with torch.no_grad():
            rows = ops.fdb_quantize(x, shape[2])
            return y, *slopes, rows.steps, ops.fdb_matmul(rows, packed), packed.dequantize()

    expected = everything()
    monkeypatch.setattr(divergence_autograd, "devices", set())
    with pytest.warns(UserWarning, match="no dual-binary kernel for cpu"):
        found = everything()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


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
        ({"alpha": torch.zeros(2, 3, 2, device="meta")}, ValueError, "alpha on meta"),
    ],
)
def test_what_cannot_be_packed(changes, error, message):
    with pytest.raises(error, match=message) as raised:
        packing(**changes)
    assert "\n" not in str(raised.value)


WORDS = torch.zeros(2, 3, 2, dtype=torch.int32)
TILES, SCALES = torch.zeros(1, 2, 1, 2, 16, dtype=torch.int32), torch.zeros(1, 2, 2, 16)


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        ("words", (WORDS, torch.zeros(2, 3, 1), 65), ValueError, r"\[2, N, 3\], got \(2, 3, 2\)"),
        ("words", (WORDS.long(), torch.zeros(2, 3, 1), 64), TypeError, "int32, got torch.int64"),
        ("words", (WORDS, torch.zeros(2, 4, 1), 64), ValueError, r"alpha must be \[2, 3, K / G\]"),
        ("words", (WORDS, torch.zeros(2, 3, 3), 64), ValueError, "64 columns .* 3 groups"),
        ("tiles", (TILES.long(), SCALES, 3, 64), TypeError, "int32, got torch.int64"),
        ("tiles", (TILES, SCALES.int(), 3, 64), TypeError, "scales must be float32"),
        ("tiles", (TILES, SCALES.to("meta"), 3, 64), ValueError, "cpu, scales on meta"),
        ("tiles", (TILES[0], SCALES, 3, 64), ValueError, "tiles must be .* with 64 columns"),
        ("tiles", (TILES, SCALES, 3, 65), ValueError, "tiles must be .* with 65 columns"),
        ("tiles", (TILES, SCALES, 17, 64), ValueError, r"tiles of 17 rows .* \[2, 2, 1, 2, 16\]"),
        ("tiles", (TILES, SCALES, 3, 66), ValueError, r"tiles of 3 rows .* \[1, 2, 2, 2, 16\]"),
        ("tiles", (TILES, SCALES[:, :1], 3, 64), ValueError, r"scales of 3 rows .* 2 groups"),
    ],
)
def test_parts_that_do_not_fit_together(make, arguments, error, message):
    make = ops.FDBPacked.from_words if make == "words" else ops.FDBPacked
    with pytest.raises(error, match=message) as raised:
        make(*arguments)
    assert "\n" not in str(raised.value)


def bytes_of(columns, group):
    values = torch.zeros(2, columns, dtype=torch.int8)
    return ops.FDBActivations(values, torch.zeros(2, columns // group), torch.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 64, dtype=torch.int32),), TypeError, "x must be float32"),
        ((torch.zeros(2, 63),), ValueError, r"\[\.\.\., 64\], got \(2, 63\)"),
        ((torch.tensor(1.0),), ValueError, r"\[\.\.\., 64\]"),
        ((torch.zeros(2, 64), torch.zeros(4)), ValueError, r"bias must be \[3\]"),
        ((torch.zeros(2, 64), torch.zeros(3, dtype=torch.int8)), TypeError, "bias must be float32"),
        ((torch.zeros(2, 64), torch.zeros(3, device="meta")), ValueError, "bias is on meta"),
        ((torch.zeros(2, 64, device="meta"),), ValueError, "x is on meta"),
        ((bytes_of(64, 64),), ValueError, "x has 1 groups, the weight 2"),
        ((bytes_of(32, 32),), ValueError, r"\[\.\.\., 64\], got \(2, 32\)"),
        (
            (bytes_of(64, 32), torch.zeros(3, requires_grad=True)),
            ValueError,
            "no gradient, and scales or bias need one",
        ),
    ],
)
def test_what_cannot_be_multiplied(arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        ops.fdb_matmul(arguments[0], packing(), *arguments[1:])
    assert "\n" not in str(raised.value)


VALUES, STEPS = torch.zeros(2, 64, dtype=torch.int8), torch.zeros(2, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.fdb_quantize(torch.zeros(2, 64).double(), 32), TypeError, "got torch.float64"),
        (lambda: ops.fdb_quantize(torch.zeros(2, 65), 32), ValueError, "group_size 32, got"),
        (lambda: ops.fdb_quantize(torch.zeros(2, 64), 0), ValueError, "group_size 0, got"),
        (lambda: ops.fdb_quantize(torch.zeros(2, 0), 1), ValueError, r"got \(2, 0\)"),
        (lambda: ops.fdb_quantize(torch.zeros(()), 1), ValueError, r"got \(\)"),
        (
            lambda: ops.fdb_quantize(torch.zeros(2, 64, requires_grad=True), 32),
            ValueError,
            "x needs one: detach it",
        ),
        (
            lambda: ops.FDBActivations(VALUES.int(), STEPS, torch.float32),
            TypeError,
            "values are int8 .* got torch.int32",
        ),
        (lambda: ops.FDBActivations(VALUES, STEPS, torch.float64), TypeError, "got torch.float64"),
        (
            lambda: ops.FDBActivations(VALUES, STEPS[:1], torch.float32),
            ValueError,
            r"leading axes, got \(1, 1\)",
        ),
        (
            lambda: ops.FDBActivations(VALUES, STEPS.to("meta"), torch.float32),
            ValueError,
            "steps on meta",
        ),
        (lambda: packing().dequantize(torch.int8), TypeError, "dtype must be float32"),
        (
            lambda: ops.fdb_matmul(torch.zeros(2, 64), torch.zeros(3, 64)),
            TypeError,
            "fdb_pack, got Tensor",
        ),
    ],
)
def test_calls_that_are_refused(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
