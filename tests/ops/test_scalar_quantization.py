"""Quantization without tables against closed forms, float64 and vector-quantize-pytorch."""

import doctest
import importlib
import itertools

import pytest
import torch

from stillhouse import ops
from stillhouse.ops import scalar_quantization

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LEVELS = {
    "offset": [[3], [8, 5, 5, 5], [7, 5, 5, 5, 5], [16, 15, 9], [4, 6]],
    "symmetric": [[2], [2, 2, 2], [2, 3, 4, 9], [8, 5, 5, 5], [16, 15, 9]],
}
TABLE = [(form, levels) for form, sets in LEVELS.items() for levels in sets]


def rows(*shape, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def middle(form, levels):
    """A number in the middle of each level's cell: one float64 [L_i] a dimension."""
    found = []
    for size in levels:
        k = torch.arange(size, dtype=torch.float64)
        if form == "symmetric":
            edge = 1 - 0.5 / (size - 1)
            found.append(torch.atanh((2 * k / (size - 1) - 1).clamp(-edge, edge)))
        else:
            half, offset = 1.001 * (size - 1) / 2, 0.5 * (size % 2 == 0)
            shift = torch.atanh(torch.tensor(offset / half, dtype=torch.float64))
            found.append(torch.atanh((k - size // 2 + offset) / half) - shift)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "levels"), TABLE)
def test_every_code_is_reached_and_comes_back(form, levels, dtype):
    """The first dimension counts least, so it is the one that runs fastest."""
    x = torch.stack(
        [each.flatten() for each in torch.meshgrid(*middle(form, levels)[::-1], indexing="ij")][
            ::-1
        ],
        -1,
    )
    codes = torch.arange(len(x))
    found = ops.fsq(x.to(dtype), levels, form=form)
    assert torch.equal(found.codes, codes)
    assert found.out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    decoded = ops.fsq_decode(codes, levels, form=form, dtype=found.out.dtype)
    assert torch.equal(decoded, found.out)
    assert len(decoded.unique(dim=0)) == len(codes)
    places = torch.tensor(levels).cumprod(0) // torch.tensor(levels)
    assert torch.equal((found.indices * places).sum(-1), codes)
    # Vectors in whatever dtype are the codes they came from.
    again = ops.fsq(decoded.to(dtype), levels, form=form, bound="clamp")
    assert torch.equal(again.codes, codes)


@pytest.mark.parametrize("size", [3, 4, 5, 8, 16])
def test_where_one_level_becomes_the_next(size):
    k = torch.arange(size - 1, dtype=torch.float64)
    half, offset = 1.001 * (size - 1) / 2, 0.5 * (size % 2 == 0)
    shift = torch.atanh(torch.tensor(offset / half, dtype=torch.float64))
    border = {
        "offset": torch.atanh((k - size // 2 + 0.5 + offset) / half) - shift,
        "symmetric": torch.atanh(2 * (k + 0.5) / (size - 1) - 1),
    }
    for form, at in border.items():
        below, above = (ops.fsq((at + step)[:, None], [size], form=form) for step in (-1e-9, 1e-9))
        assert torch.equal(below.codes, k.long())
        assert torch.equal(above.codes, k.long() + 1)


def test_values_by_hand():
    x = torch.tensor([[-9.0], [0.0], [9.0]])
    even, odd = torch.tensor([[-1.0], [0], [0.75]]), torch.tensor([[-1.0], [0], [1]])
    assert torch.equal(ops.fsq(x, [8]).out, even)
    assert torch.equal(ops.fsq(x, [5]).out, odd)
    assert ops.fsq(x, [8]).codes.tolist() == [0, 4, 7]
    assert ops.fsq(x, [4], form="symmetric").out.abs().flatten().tolist()[::2] == [1, 1]
    assert ops.fsq(x, [5], form="symmetric").codes.tolist() == [0, 2, 4]
    assert ops.lfq(torch.tensor([[3.0, -2, 0, 1e-30]])).out.tolist() == [[1, -1, -1, 1]]
    assert ops.lfq(torch.tensor([[3.0, -2, 0, 1e-30]])).codes.tolist() == [9]
    assert ops.bsq(torch.tensor([[3.0, -2, 0, 1e-30]])).out.tolist() == [[0.5, -0.5, -0.5, 0.5]]


@pytest.mark.parametrize("form", ["offset", "symmetric"])
def test_a_level_is_the_same_wherever_it_comes_from(form):
    """To the last bit, though a gradient passes through."""
    x, levels = rows(5000, 4), [9, 6, 7, 14]
    found = ops.fsq(x, levels, form=form)
    assert torch.equal(found.out, ops.fsq_decode(found.codes, levels, form=form))
    assert torch.equal(ops.bsq(x).out, ops.bsq_decode(ops.bsq(x).codes, 4))


def test_two_levels_are_signs():
    x = rows(500, 7)
    fsq, lfq = ops.fsq(x, [2] * 7, form="symmetric"), ops.lfq(x.flip(-1))
    assert torch.equal(fsq.codes, lfq.codes)
    assert torch.equal(fsq.out, lfq.out.flip(-1))


@pytest.mark.parametrize("form", ["offset", "symmetric"])
def test_there_is_no_level_beyond_the_last(form):
    """1.001 (L - 1) / 2 is half a level too far from 1001 levels on."""
    x = torch.tensor([[-100.0, -100], [100, 100]])
    found = ops.fsq(x, [4000, 4001], form=form)
    assert found.indices.tolist() == [[0, 0], [3999, 4000]]
    assert found.codes.tolist() == [0, 4000 * 4001 - 1]


def test_codes_as_large_as_int64_holds():
    codes = torch.tensor([0, 1, 2**53 + 1, 2**62 - 1, 2**62 + 5, 2**63 - 1])
    for decode, encode in ((ops.lfq_decode, ops.lfq), (ops.bsq_decode, ops.bsq)):
        vectors = decode(codes, 63)
        assert torch.equal(encode(vectors).codes, codes)
        assert torch.equal(encode(vectors).out, vectors)
    levels = [1000] * 6  # 10^18
    codes = torch.tensor([0, 999_999_999_999_999_999, 123_456_789_012_345_678])
    vectors = ops.fsq_decode(codes, levels, form="symmetric")
    assert torch.equal(ops.fsq(vectors, levels, form="symmetric", bound="clamp").codes, codes)


@pytest.mark.parametrize("bits", [1, 2, 9, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_signs(bits, dtype):
    codes = torch.arange(2**bits)
    vectors = ops.lfq_decode(codes, bits, dtype=dtype)
    corners = torch.tensor(list(itertools.product([-1, 1], repeat=bits)))
    assert torch.equal(vectors.long(), corners)  # the first bit counts most
    assert torch.equal(ops.lfq(vectors).codes, codes)
    assert torch.equal(ops.lfq(vectors).indices * 2 - 1, corners)
    sphere = ops.bsq_decode(codes, bits, dtype=torch.float64)
    torch.testing.assert_close(sphere.norm(dim=-1), torch.ones(len(codes), dtype=torch.float64))
    assert torch.equal(ops.bsq(sphere).out, sphere)


def test_what_is_not_quantized():
    x = rows(6, 4)
    x[1, 2], x[2, 0], x[3, 3], x[4, 1] = torch.nan, torch.inf, -torch.inf, torch.nan
    mask = torch.tensor([True, True, True, True, False, False])
    for call in (
        lambda x, **words: ops.fsq(x, [8, 5, 5, 5], **words),
        lambda x, **words: ops.fsq(x, [8, 5, 5, 5], form="symmetric", bound="clamp", **words),
        ops.lfq,
        ops.bsq,
        lambda x, **words: ops.residual_fsq(x, [8, 5, 5, 5], 3, **words),
    ):
        own = x.clone().requires_grad_()
        found, alone = call(own, mask=mask), call(x[:1])
        assert torch.equal(found.out[:1], alone.out)
        assert torch.equal(found.codes[:1], alone.codes)
        assert (found.codes[0] >= 0).all()
        assert (found.codes[1:] == -1).all()
        assert found.out[1:4].isnan().all()
        assert not found.out[4:].any()
        found.out.nansum().backward()
        assert own.grad[0].any()
        assert not own.grad[1:].any()
        broken = call(x).codes.reshape(6, -1)
        assert (broken[1:5] == -1).all()
        assert (broken[[0, 5]] >= 0).all()
    found = ops.fsq(x, [8, 5, 5, 5], mask=mask)
    assert (found.indices[1:] == -1).all()
    assert (found.indices[0] >= 0).all()
    # Of a row that is not finite what is beyond its depth is not, either.
    own, depth = x.clone().requires_grad_(), torch.tensor([0, 2, 0, 0, 0, 3])
    found = ops.residual_fsq(own, [5] * 4, 3, num_quantizers=depth)
    assert found.error[1].isnan().tolist() == [True, True, False]
    assert not found.error[1, 2]
    assert found.out[1].isnan().all()
    assert not found.out[[0, 2, 3, 4]].any()
    found.out.nansum().backward()
    assert not own.grad[:5].any()
    assert own.grad[5].any()
    found = ops.residual_fsq(x, [5] * 4, 3, mask=mask)
    assert found.error[1:4].isnan().all()
    assert not found.error[4:].any()
    for empty in (ops.fsq(x[:0], [4] * 4), ops.lfq(x[:0]), ops.residual_fsq(x[:0], [4] * 4, 2)):
        assert empty.out.shape == (0, 4)
        assert len(empty.codes) == 0


# Gradients ----------------------------------------------------------------------------------------


def jacobian(call, x):
    return torch.autograd.functional.jacobian(call, x)


@pytest.mark.parametrize("levels", [[4, 5, 8], [3, 7, 16]])
def test_gradients_pass_the_rounding_and_not_the_bound(levels):
    x, sizes = rows(3, dtype=torch.float64), torch.tensor(levels)
    half = 1.001 * (sizes - 1).double() / 2
    offset = torch.where(sizes % 2 == 0, 0.5, 0.0).double()
    slope = half / (sizes // 2) / torch.cosh(x + torch.atanh(offset / half)) ** 2
    torch.testing.assert_close(jacobian(lambda x: ops.fsq(x, levels).out, x), slope.diag())
    slope = 1 / torch.cosh(x) ** 2
    found = jacobian(lambda x: ops.fsq(x, levels, form="symmetric").out, x)
    torch.testing.assert_close(found, slope.diag())
    x = torch.tensor([-1.5, 0.3, 1.5], dtype=torch.float64)
    found = jacobian(lambda x: ops.fsq(x, levels, form="symmetric", bound="clamp").out, x)
    assert found.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_gradients_of_signs():
    x = rows(5, dtype=torch.float64)
    eye = torch.eye(5, dtype=torch.float64)
    assert torch.equal(jacobian(lambda x: ops.lfq(x).out, x), eye)
    unit = x / x.norm()
    expected = (eye - unit[:, None] * unit) / x.norm()
    torch.testing.assert_close(jacobian(lambda x: ops.bsq(x).out, x), expected)
    for size in (1e-200, 1e200):
        found = jacobian(lambda x: ops.bsq(x).out, x * size)
        torch.testing.assert_close(found * size, expected)
    nothing = torch.zeros(5, dtype=torch.float64)
    assert not jacobian(lambda x: ops.bsq(x).out, nothing).any()


# In stages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5, 8, 10])
def test_stages_are_digits(size):
    """Of a number's place between -e and e, in base L."""
    stages, edge = 6, size / (size - 1)
    x = rows(4000, 1, dtype=torch.float64, scale=1.5)
    place = (torch.tanh(x / edge) + 1) / 2 * size**stages
    sure = (place - place.round()).abs().squeeze(-1) > 1e-6
    digits = place.long() // size ** torch.arange(stages - 1, -1, -1) % size
    found = ops.residual_fsq(x, [size], stages)
    assert sure.float().mean() > 0.99
    assert torch.equal(found.codes[sure], digits[sure])
    left = (torch.tanh(x / edge) * edge - found.out).abs()
    assert left.max() <= edge * float(size) ** -stages * (1 + 1e-6)
    torch.testing.assert_close(found.error[:, -1], left.squeeze(-1) ** 2)
    assert torch.equal(ops.residual_fsq_decode(found.codes, [size], dtype=x.dtype), found.out)


def test_depths_are_calls_of_fewer_stages():
    x, levels = rows(40, 4), [8, 5, 5, 3]
    depth = torch.arange(40) % 6
    found = ops.residual_fsq(x, levels, 5, num_quantizers=depth)
    for stages in range(1, 6):
        of_depth = depth == stages
        alone = ops.residual_fsq(x[of_depth], levels, 5, num_quantizers=stages)
        assert alone.codes.shape == (len(alone.out), stages)
        assert torch.equal(found.codes[of_depth, :stages], alone.codes)
        assert torch.equal(found.out[of_depth], alone.out)
        assert torch.equal(found.error[of_depth, :stages], alone.error)
        assert (found.codes[of_depth, stages:] == -1).all()
        assert not found.error[of_depth, stages:].any()
        assert torch.equal(ops.residual_fsq_decode(alone.codes, levels), alone.out)
    assert torch.equal(ops.residual_fsq_decode(found.codes, levels), found.out)
    assert not found.out[depth == 0].any()
    whole = ops.residual_fsq(x, levels, 5)
    assert (whole.error.diff(dim=-1) < 0).float().mean() > 0.99


def test_gradients_of_stages():
    levels, edge = [4, 5, 3], torch.tensor([4 / 3, 5 / 4, 3 / 2], dtype=torch.float64)
    x = torch.tensor([0.4, -1.9, 0.9], dtype=torch.float64)
    slope = 1 / torch.cosh(x / edge) ** 2
    bounded = torch.tanh(x / edge) * edge

    def out(x, grad, stages=3):
        return ops.residual_fsq(x, levels, stages, grad=grad).out

    torch.testing.assert_close(jacobian(lambda x: out(x, "ste"), x), slope.diag())
    times = torch.zeros(3, dtype=torch.float64)
    for stage in range(3):
        taken = out(x, "ste", stage) if stage else 0
        times += ((bounded - taken) * torch.tensor(levels) ** stage).abs() <= 1
    assert 0 < times.min() < times.max() == 3  # a clamp cuts, and one does not
    torch.testing.assert_close(jacobian(lambda x: out(x, "stage_sum"), x), (times * slope).diag())
    error = jacobian(lambda x: ops.residual_fsq(x, levels, 3).error, x)
    taken = torch.stack([out(x, "ste", stages) for stages in (1, 2, 3)])
    torch.testing.assert_close(error, 2 * (bounded - taken) * slope)


# Beside vector-quantize-pytorch -------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip("vector_quantize_pytorch")


@pytest.mark.parametrize("bound", ["tanh", "clamp"])
@pytest.mark.parametrize("form", ["offset", "symmetric"])
def test_fsq_beside_a_peer(peer, form, bound):
    levels = [8, 5, 6, 7]
    theirs = peer.FSQ(
        levels, preserve_symmetry=form == "symmetric", bound_hard_clamp=bound == "clamp"
    )
    ours, x = rows(4, 500, 4).requires_grad_(), rows(4, 500, 4).requires_grad_()
    upstream = rows(4, 500, 4, seed=1)
    out, codes = theirs(x)
    found = ops.fsq(ours, levels, form=form, bound=bound)
    assert torch.equal(found.codes, codes.long())
    torch.testing.assert_close(found.out, out, atol=3e-7, rtol=0)
    every = torch.arange(theirs.codebook_size)
    torch.testing.assert_close(
        ops.fsq_decode(every, levels, form=form), theirs.indices_to_codes(every), atol=3e-7, rtol=0
    )
    out.backward(upstream)
    found.out.backward(upstream)
    torch.testing.assert_close(ours.grad, x.grad)


@pytest.mark.parametrize("levels", [[2, 2, 2], [5, 5, 3], [8, 4, 16]])
def test_residual_fsq_beside_a_peer(peer, levels):
    theirs = peer.ResidualFSQ(levels=levels, num_quantizers=3)
    ours, x = rows(4, 500, 3).requires_grad_(), rows(4, 500, 3).requires_grad_()
    upstream = rows(4, 500, 3, seed=1)
    out, codes = theirs(x)
    found = ops.residual_fsq(ours, levels, 3, grad="stage_sum")
    same = (found.codes == codes).all(-1)
    assert same.float().mean() > 0.999  # their straight-through sum is off by a bit of float32
    torch.testing.assert_close(found.out[same], out[same], atol=1e-6, rtol=0)
    decoded = theirs.get_output_from_indices(found.codes)
    torch.testing.assert_close(ops.residual_fsq_decode(found.codes, levels), decoded)
    out.backward(upstream)
    found.out.backward(upstream)
    torch.testing.assert_close(ours.grad[same], x.grad[same])


@pytest.mark.parametrize("spherical", [False, True])
def test_signs_beside_a_peer(peer, spherical):
    theirs = peer.LFQ(codebook_size=2**10, spherical=spherical)
    ours, x = rows(4, 500, 10).requires_grad_(), rows(4, 500, 10).requires_grad_()
    upstream = rows(4, 500, 10, seed=1)
    out, codes, _ = theirs(x)
    found = (ops.bsq if spherical else ops.lfq)(ours)
    assert torch.equal(found.codes, codes.long())
    torch.testing.assert_close(found.out, out)
    decoded = (ops.bsq_decode if spherical else ops.lfq_decode)(found.codes, 10)
    torch.testing.assert_close(decoded, theirs.indices_to_codes(codes))
    out.backward(upstream)
    found.out.backward(upstream)
    torch.testing.assert_close(ours.grad, x.grad)


# Calls --------------------------------------------------------------------------------------------


def test_compiled():
    def everything(x, depth):
        first = ops.fsq(x, [8, 5, 5, 3])
        second = ops.residual_fsq(x, (4, 4, 4, 4), 3, num_quantizers=depth)
        sphere = ops.bsq(x)
        decoded = ops.fsq_decode(first.codes, [8, 5, 5, 3])
        loss = (first.out * sphere.out + second.out).sum() + second.error.sum() + decoded.sum()
        return loss, first.codes, second.codes, sphere.codes, ops.lfq(x).codes

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True)
    for step in range(10):
        x, depth = rows(30, 4, seed=step), torch.arange(30) % 4
        found = []
        for function in (everything, compiled):
            own = x.clone().requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=True):
                loss, *codes = function(own, depth)
            loss.backward()
            found.append((codes, own.grad))
        assert all(map(torch.equal, found[0][0], found[1][0]))
        torch.testing.assert_close(found[0][1], found[1][1])


def test_levels_as_a_tensor():
    x, levels = rows(50, 4), [8, 5, 5, 5]
    for form in ("offset", "symmetric"):
        found = ops.fsq(x, torch.tensor(levels), form=form)
        assert torch.equal(found.codes, ops.fsq(x, levels, form=form).codes)


def test_examples_run():
    for name in ("scalar_quantization", "bit_entropy"):
        module = importlib.import_module(f"stillhouse.ops.{name}")
        outcome = doctest.testmod(module)
        assert outcome.attempted > 3
        assert outcome.failed == 0
    assert scalar_quantization.WIDER == 1e-3


X = rows(5, 4)
CODES = torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.fsq(X, [8, 5, 5]), ValueError, r"x must be \[..., 3\], one number for each"),
        (lambda: ops.fsq(X, []), ValueError, "needs two levels or more"),
        (lambda: ops.fsq(X, [8, 5, 1, 5]), ValueError, r"two levels or more, got \[8, 5, 1, 5\]"),
        (lambda: ops.fsq(X, [8, 5, 2, 5]), ValueError, "two levels need form='symmetric'"),
        (lambda: ops.fsq(X, [8, 5, 5.0, 5]), TypeError, "levels must be ints"),
        (lambda: ops.fsq(X, [8, 5, True, 5]), TypeError, "levels must be ints"),
        (lambda: ops.fsq(X, 8), TypeError, "levels must be ints"),
        (lambda: ops.fsq(X, torch.ones(4)), TypeError, r"levels must be int64 \[d\]"),
        (lambda: ops.fsq(X, [2**16] * 4), ValueError, "more codes than int64 has numbers"),
        (lambda: ops.fsq(X.long(), [8] * 4), TypeError, "x must be a float tensor"),
        (lambda: ops.fsq(torch.tensor(1.0), [8]), ValueError, "x must be"),
        (lambda: ops.fsq(X, [8] * 4, form="even"), ValueError, "form must be one of offset"),
        (lambda: ops.fsq(X, [8] * 4, bound="none"), ValueError, "bound must be one of tanh"),
        (lambda: ops.fsq(X, [8] * 4, mask=torch.ones(5)), TypeError, "mask must be bool"),
        (
            lambda: ops.fsq(X, [8] * 4, mask=torch.ones(4, dtype=torch.bool)),
            ValueError,
            "mask must have the rows' shape",
        ),
        (lambda: ops.fsq_decode(CODES + 20, [4, 5]), ValueError, "codes must be from -1 to 19"),
        (lambda: ops.fsq_decode(CODES - 2, [4, 5]), ValueError, "from -1 to 19, got -2 to -2"),
        (lambda: ops.fsq_decode(CODES, [2]), ValueError, "two levels need"),
        (lambda: ops.residual_fsq(X, [4] * 4, 0), ValueError, "one stage or more, got 0"),
        (
            lambda: ops.residual_fsq(X, [4] * 4, 2, num_quantizers=3),
            ValueError,
            "num_quantizers must be from 1 to 2, the number of stages, got 3",
        ),
        (
            lambda: ops.residual_fsq(X, [4] * 4, 2, num_quantizers=CODES[:4]),
            ValueError,
            "num_quantizers must have the rows' shape",
        ),
        (lambda: ops.residual_fsq(X, [4] * 4, 2, grad="none"), ValueError, "grad must be one of"),
        (
            lambda: ops.residual_fsq(X, [4] * 4, 2, num_quantizers=torch.tensor(3)),
            ValueError,
            "num_quantizers must be from 0 to 2, got 3",
        ),
        (lambda: ops.lfq(X[:, :0]), ValueError, "from 1 to 63 bits, got 0"),
        (lambda: ops.bsq(X.repeat(1, 16)), ValueError, "from 1 to 63 bits, got 64"),
        (lambda: ops.lfq(X.int()), TypeError, "x must be a float tensor"),
        (lambda: ops.lfq_decode(CODES + 8, 3), ValueError, "codes must be from -1 to 7, got 8"),
        (lambda: ops.bsq_decode(CODES, 64), ValueError, "from 1 to 63 bits, got 64"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_code_minus_one_is_nothing():
    codes = torch.tensor([[-1, 3], [2, -1]])
    assert ops.fsq_decode(codes, [3, 3])[0, 0].tolist() == [0, 0]
    assert ops.lfq_decode(codes, 3)[1, 1].tolist() == [0, 0, 0]
    only = ops.fsq_decode(codes[1, :1], [3, 3], form="symmetric")
    assert torch.equal(ops.residual_fsq_decode(codes[1], [3, 3]), only[0])
