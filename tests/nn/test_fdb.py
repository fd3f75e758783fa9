"""Dual-binary weights against closed forms and brute force; the layer against both."""

import copy
import itertools

import pytest
import torch
from torch import nn

from stillhouse import ops
from stillhouse.nn import FDBLinear, FDBWeight, fdb_fit

WEIGHT = torch.tensor([[-1.0, -0.2, 0.3, 0.6, 1.4, 2.2]])


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def group_errors(weight, fdb):
    gap = fdb.dequantize(weight.dtype) - weight
    return gap.square().unflatten(1, (fdb.alpha.shape[2], -1)).sum(-1)


# Levels -------------------------------------------------------------------------------------------


def test_six_weights_by_hand():
    fdb = FDBWeight.nearest(WEIGHT, torch.tensor([[[2.0]], [[-1.0]]]).half())
    assert fdb.planes.int().tolist() == [[[0, 0, 0, 1, 1, 1]], [[1, 0, 0, 1, 1, 0]]]
    assert fdb.dequantize().tolist() == [[-1, 0, 0, 1, 1, 2]]
    assert fdb.density().tolist() == [0.5, 0.5]


def test_the_paper_is_the_mirrored_integer_bit_for_bit():
    weight = normal(40, 192)
    fdb = FDBWeight.from_dense(weight, 64)
    groups = weight.unflatten(1, (3, 64))
    scale = (groups.abs().amax(-1, keepdim=True) / 2).half().float()
    integer = (groups / scale).round().clamp(-1, 2)
    assert torch.equal(fdb.dequantize(), (integer * scale).flatten(1))
    assert torch.equal(fdb.alpha[0], (2 * scale[..., 0]).half())
    assert torch.equal(fdb.alpha[1], (-scale[..., 0]).half())


def test_planes_are_those_of_the_papers_thresholds():
    """Where a2 < 0 < a1 + a2 < a1, ties aside."""
    weight, a1, a2 = normal(30, 64), 1.7, -0.9
    fdb = FDBWeight.nearest(weight, torch.tensor([a1, a2]).view(2, 1, 1).expand(2, 30, 1))
    b1 = weight >= (a1 + a2) / 2
    b2 = -(weight - a1 * b1 - a2 / 2) >= 0
    assert torch.equal(fdb.planes, torch.stack([b1, b2]))


def test_levels_are_the_nearest_whatever_the_scales():
    weight = normal(50, 64)
    alpha = normal(2, 50, 4, seed=1)
    fdb = FDBWeight.nearest(weight, alpha)
    levels = [x * alpha[0] + y * alpha[1] for x, y in itertools.product((0, 1), repeat=2)]
    gaps = torch.stack(levels, -1)[:, :, None] - weight.unflatten(1, (4, 16))[..., None]
    least = gaps.abs().amin(-1).flatten(1)
    assert torch.equal((fdb.dequantize() - weight).abs(), least)


def test_of_two_as_near_the_lower_code():
    # Levels 0, 2, -1, 1: -0.5 lies between codes 0 and 2, 0.5 between 0 and 3, 1.5 between 1 and 3.
    weight = torch.tensor([[-0.5, 0.5, 1.5]])
    fdb = FDBWeight.nearest(weight, torch.tensor([[[2.0]], [[-1.0]]]))
    assert fdb.planes.int().tolist() == [[[0, 0, 1]], [[0, 0, 0]]]


# Scales -------------------------------------------------------------------------------------------


def test_errors_of_normal_groups():
    """Mean squared errors of groups of 64 normal numbers, by four ways of finding two scales."""
    weight = normal(4000, 64)
    positive = torch.cat([fdb_fit.search_scale(part, (1.0,)) for part in weight.split(1000)])
    ways = [FDBWeight.from_dense(weight, 64, method) for method in fdb_fit.METHODS]
    ways.insert(1, FDBWeight.nearest(weight, fdb_fit.of_scale(positive)[..., None].half()))
    errors = [group_errors(weight, each).mean().item() / 64 for each in ways]
    assert errors == pytest.approx([0.1695, 0.1430, 0.1230, 0.1140], abs=2e-3)
    assert errors == sorted(errors, reverse=True)


def test_cells_of_normal_weights_at_the_best_scale():
    weight = normal(1000, 640)
    alpha = torch.tensor([2.1, -1.05]).view(2, 1, 1).expand(2, 1000, 10)
    first, second = FDBWeight.nearest(weight, alpha).planes
    cells = [~first & ~second, first & ~second, ~first & second, first & second]
    shares = torch.stack(cells).float().mean((1, 2))
    assert shares.tolist() == pytest.approx([0.400, 0.058, 0.300, 0.243], abs=3e-3)
    assert -(shares * shares.log2()).sum().item() == pytest.approx(1.78, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_group_is_worse_for_a_better_method(dtype):
    weight = torch.cat([normal(100, 128), normal(100, 128, seed=1).exp(), normal(9, 128) ** 5])
    # The last rows are so small that rounding a scale to float16 can undo what it has gained.
    weight = torch.cat([weight, 3e-7 * normal(100, 128)]).to(dtype)
    errors = [
        group_errors(weight, FDBWeight.from_dense(weight, 32, method)) for method in fdb_fit.METHODS
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert (errors[2] <= errors[1] * (1 + 1e-5)).all()


def test_least_squares_are_those_of_a_solver():
    groups, planes = normal(50, 32, dtype=torch.float64), normal(2, 50, 32, seed=1) > 0
    found = fdb_fit.least_squares(groups, planes, torch.zeros(2, 50, dtype=torch.float64))
    design = planes.permute(1, 2, 0).double()
    expected = torch.linalg.lstsq(design, groups[..., None]).solution[..., 0].T
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", ["first empty", "second empty", "both empty", "coincide"])
def test_planes_without_one_solution_keep_a_scale(case):
    groups, planes = normal(1, 32, dtype=torch.float64), normal(2, 1, 32, seed=1) > 0
    if case == "coincide":
        planes[1] = planes[0]
    else:
        planes[{"first empty": [0], "second empty": [1], "both empty": [0, 1]}[case]] = False
    before = torch.tensor([[0.7], [-0.3]], dtype=torch.float64)
    found = fdb_fit.least_squares(groups, planes, before)
    assert found.isfinite().all()

    def error(alpha):
        return ((alpha[..., None] * planes).sum(0) - groups).square().sum()

    best = torch.linalg.lstsq(planes[:, 0].T.double(), groups[0], driver="gelsd").solution
    torch.testing.assert_close(error(found), error(best[:, None]))
    kept = {"first empty": 0, "second empty": 1, "coincide": 1}.get(case, [0, 1])
    assert torch.equal(found[kept], before[kept])


@pytest.mark.parametrize("method", fdb_fit.METHODS)
def test_groups_of_zeros_are_zeros(method):
    weight = torch.zeros(2, 64)
    weight[1, 32:] = normal(32)
    fdb = FDBWeight.from_dense(weight, 32, method)
    assert not fdb.alpha[:, 0].any()
    assert not fdb.planes[:, 0].any()
    assert fdb.dequantize()[1, 32:].any()


def test_a_group_of_one_number_is_exact():
    fdb = FDBWeight.from_dense(torch.full((1, 32), -0.375), 32, "ls")
    assert fdb.dequantize().unique().tolist() == [-0.375]


@pytest.mark.parametrize("group", [1, 13, 39])
def test_any_group_that_divides(group):
    weight = normal(5, 39)
    fdb = FDBWeight.from_dense(weight, group, "ls")
    x = normal(3, 39, seed=2)
    expected = x @ fdb.dequantize().T
    torch.testing.assert_close(ops.fdb_matmul(x, fdb.pack()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weight", "options", "error", "message"),
    [
        (torch.zeros(2, 65), {}, ValueError, "65 columns are no multiple of group_size 64"),
        (torch.zeros(2, 64), {"group_size": 0}, ValueError, "group_size 0"),
        (torch.zeros(64), {}, ValueError, r"\[N, K\], got \(64,\)"),
        (torch.full((2, 64), torch.nan), {}, ValueError, "not finite"),
        (torch.full((2, 64), torch.inf), {}, ValueError, "not finite"),
        (torch.full((2, 64), 1e5), {}, ValueError, "beyond float16's"),
        (torch.zeros(2, 64, dtype=torch.int8), {}, TypeError, "floats is needed, got torch.int8"),
        (torch.zeros(2, 64), {"method": "rtn"}, ValueError, "one of paper, mse, ls, got 'rtn'"),
    ],
)
def test_weights_that_cannot_be_binarized(weight, options, error, message):
    with pytest.raises(error, match=message) as raised:
        FDBWeight.from_dense(weight, **options)
    assert "\n" not in str(raised.value)


# The layer ----------------------------------------------------------------------------------------


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return nn.Linear(128, 6)


def test_it_computes_with_the_levels(dense):
    layer = FDBLinear.from_linear(dense, 32, "mse")
    x = normal(4, 128)
    weight = FDBWeight.from_dense(dense.weight, 32, "mse").dequantize()
    expected = x @ weight.T + dense.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.to_linear()(x), expected)
    torch.testing.assert_close(layer.freeze()(x), expected)
    torch.testing.assert_close(layer.to_linear()(x), expected)


def test_the_gradient_of_the_scales_with_fixed_planes(dense):
    """dL/dalpha_p[n, g] = sum over the group of (dy^T x) b_p, and alpha = initial (1 + change)."""
    layer = FDBLinear.from_linear(dense, 32)
    x, upstream = normal(5, 128), normal(5, 6, seed=1)
    layer(x).backward(upstream)
    planes = layer.quantized().planes.unflatten(2, (4, 32))
    of_alpha = ((upstream.T @ x).unflatten(1, (4, 32)) * planes).sum(-1)
    torch.testing.assert_close(layer.change.grad, of_alpha * layer.initial.float())
    assert layer.latent.grad is None


def test_frozen_it_has_the_same_gradient_to_its_input(dense):
    layer = FDBLinear.from_linear(dense, 32)
    x = normal(5, 128).requires_grad_()
    (training,) = torch.autograd.grad(layer(x).square().sum(), x)
    (frozen,) = torch.autograd.grad(layer.freeze()(x).square().sum(), x)
    torch.testing.assert_close(training, frozen)


def test_weights_get_the_gradient_of_their_levels_within_a_step(dense):
    layer = FDBLinear(6, 1, bias=False, group_size=6, train_latent=True)
    # Levels 0, 2, -1, 1 and a step of 1: what lies beyond -2 or 3 is not pulled.
    with torch.no_grad():
        layer.latent.copy_(torch.tensor([[-2.1, -1.9, 0.3, 1.2, 2.9, 3.1]]))
        layer.initial.copy_(torch.tensor([[[2.0]], [[-1.0]]]))
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    layer(x).sum().backward()
    assert layer.latent.grad.tolist() == [[0, 2, 3, 4, 5, 0]]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_gradient_through_the_thresholds(sign):
    """By hand, with db1/dt1 = 1, dt1/da = -1/2, db2/dr = -1, r = w - a1 b1 - a2/2."""
    layer = FDBLinear(1, 1, bias=False, group_size=1, gradient="thresholds", train_latent=True)
    a1, a2, w = sign * 1.75, sign * -0.75, sign * 0.7
    with torch.no_grad():
        layer.latent.fill_(w)
        layer.initial.copy_(torch.tensor([[[a1]], [[a2]]]))
    layer(torch.ones(1, 1)).sum().backward()
    b1 = b2 = 1  # the level a1 + a2
    s = sign
    of_b2 = a2
    of_b1 = a1 + of_b2 * (-s) * (-a1)
    of_a1 = b1 + of_b1 * (-s / 2) + of_b2 * (-s) * (-b1)
    of_a2 = b2 + of_b1 * (-s / 2) + of_b2 * (-s) * (-1 / 2)
    assert layer.change.grad.flatten().tolist() == pytest.approx([of_a1 * a1, of_a2 * a2])
    assert layer.latent.grad.item() == pytest.approx(of_b1 * s + of_b2 * -s)


def test_thresholds_change_the_gradient_alone(dense):
    layers = [FDBLinear.from_linear(dense, 32, gradient=each) for each in ("planes", "thresholds")]
    x = normal(4, 128)
    torch.testing.assert_close(*(layer(x) for layer in layers))


def test_scales_learn_towards_the_dense_layer(dense):
    layer = FDBLinear.from_linear(dense, 32, "paper")
    x = normal(256, 128)
    wanted = dense(x).detach()
    optimizer = torch.optim.AdamW([layer.change], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    # What is stored is what was trained.
    trained = layer(x)
    frozen = layer.freeze()
    torch.testing.assert_close(frozen(x), trained, rtol=1e-5, atol=1e-6)


def test_scales_are_those_of_float16(dense):
    layer = FDBLinear.from_linear(dense, 32)
    with torch.no_grad():
        layer.change.uniform_(-0.3, 0.3)
    scales = layer.scales().detach()
    assert torch.equal(scales, scales.half().float())
    assert torch.equal(scales.half(), (layer.initial.float() * (1 + layer.change)).detach().half())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_its_state_goes_through_safetensors(frozen, bias, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = FDBLinear.from_linear(nn.Linear(96, 5, bias=bias), 32)
    if frozen:
        layer.freeze()
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    again = FDBLinear(96, 5, bias=bias, group_size=32, frozen=frozen)
    again.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    x = normal(3, 96)
    assert torch.equal(again(x), layer(x))


def test_a_frozen_state_is_two_and_a_half_bits_a_weight(dense):
    layer = FDBLinear.from_linear(nn.Linear(256, 64, bias=False), 64).freeze()
    assert not list(layer.parameters())
    size = sum(each.numel() * each.element_size() for each in layer.state_dict().values())
    assert 8 * size / (256 * 64) == 2.5


def test_a_cast_leaves_the_scales(dense):
    frozen = FDBLinear.from_linear(dense, 32).freeze()
    before = frozen.alpha.clone()
    frozen.to(torch.bfloat16)
    assert torch.equal(frozen.alpha, before)
    assert frozen.alpha.dtype == torch.float16
    assert frozen.bias.dtype == torch.bfloat16
    x = normal(3, 128).bfloat16()
    assert frozen(x).dtype == torch.bfloat16
    training = FDBLinear.from_linear(dense, 32).to(torch.bfloat16)
    assert training.initial.dtype == torch.float16
    assert training(x).dtype == torch.bfloat16


def test_a_copy_is_its_own(dense):
    layer = FDBLinear.from_linear(dense, 32)
    other = copy.deepcopy(layer)
    other.freeze()
    assert not layer.frozen
    assert "latent" in layer.state_dict()
    assert other.freeze() is other


def test_infinite_scales_do_not_freeze(dense):
    layer = FDBLinear.from_linear(dense, 32)
    with torch.no_grad():
        layer.change.fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        layer.freeze()
    assert not layer.frozen


def test_bad_options():
    with pytest.raises(ValueError, match="65 columns are no multiple of group_size 64"):
        FDBLinear(65, 3)
    with pytest.raises(ValueError, match="planes or thresholds, got 'both'"):
        FDBLinear(64, 3, gradient="both")
