"""Frozen dual-binary layers: what lies in their state, and rows of 8 bits."""

import copy

import pytest
import torch
from torch import nn

from stillhouse import ops
from stillhouse.nn import FDBLinear
from stillhouse.nn.fdb_surgery import freeze_fdb_


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


@pytest.fixture(params=[(96, 5, 32), (130, 18, 65)], ids=str)
def layer(request):
    columns, rows, group = request.param
    torch.manual_seed(0)
    return FDBLinear.from_linear(nn.Linear(columns, rows), group).freeze()


def like(layer, **options):
    sizes = layer.in_features, layer.out_features, layer.bias is not None, layer.group_size
    return FDBLinear(*sizes, frozen=True, **options)


# State --------------------------------------------------------------------------------------------


def test_its_state_does_not_know_of_tiles(layer):
    weight = layer.quantized()
    state = layer.state_dict()
    assert list(state) == ["bias", "planes", "alpha"]
    packed = weight.pack()
    assert torch.equal(state["planes"], packed.planes)
    assert torch.equal(state["alpha"], weight.alpha)
    assert state["alpha"].dtype == torch.float16
    assert all(each.is_contiguous() for each in state.values())
    assert [name for name, _ in layer.named_buffers()] == ["tiles", "tile_scales"]
    assert torch.equal(layer.planes, state["planes"])
    assert torch.equal(layer.alpha, state["alpha"])
    nested = nn.Sequential(nn.Linear(2, 2), layer)
    assert {"1.planes", "1.alpha", "1.bias"} < set(nested.state_dict())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_loads(layer, assign, device):
    x = normal(3, layer.in_features)
    again = nn.Sequential(like(layer, device=device))
    state = nn.Sequential(layer).state_dict()
    if device == "meta" and not assign:
        with pytest.warns(UserWarning, match="copying from a non-meta parameter .* to a meta"):
            again.load_state_dict(state)
        assert again[0].tiles.is_meta
        return
    kept = again[0].tiles
    assert str(again.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert (again[0].tiles is kept) != assign
    assert torch.equal(again(x), layer(x))
    assert torch.equal(again[0].to_linear().weight, layer.to_linear().weight)


def test_scales_of_another_dtype_become_float16(layer):
    state = layer.state_dict()
    state["alpha"] = state["alpha"].float()
    for assign in (False, True):
        again = like(layer)
        again.load_state_dict(state, assign=assign)
        assert again.alpha.dtype == torch.float16
        assert torch.equal(again.alpha, layer.alpha)


def test_bits_beyond_the_last_column_do_not_count(layer):
    state, again = layer.state_dict(), like(layer)
    if layer.in_features % 32:
        state["planes"][..., -1] |= -1 << layer.in_features % 32
    again.load_state_dict(state)
    assert torch.equal(again.tiles, layer.tiles)


@pytest.mark.parametrize("name", ["planes", "alpha", "bias"])
def test_a_state_that_lacks_something(layer, name):
    state, again = layer.state_dict(), nn.Sequential(like(layer))
    state = {f"0.{key}": each for key, each in state.items() if key != name}
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "0.{name}"'):
        again.load_state_dict(state)
    missing, unexpected = again.load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([f"0.{name}"], [])
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0.latent"'):
        again.load_state_dict(nn.Sequential(layer).state_dict() | {"0.latent": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("planes", lambda x: x[:, 1:], r"0.planes must be int32 \[2, .*, got torch.int32 \[2"),
        ("planes", lambda x: x.float(), r"0.planes must be int32 .*, got torch.float32"),
        ("alpha", lambda x: x[..., :1], r"0.alpha must be float16 \[2, .*, got torch.float16 \[2"),
        ("alpha", lambda x: x.int(), r"0.alpha must be float16 .*, got torch.int32"),
    ],
)
def test_a_state_of_another_shape(layer, name, change, message):
    state, again = nn.Sequential(layer).state_dict(), nn.Sequential(like(layer))
    state[f"0.{name}"] = change(state[f"0.{name}"])
    with pytest.raises(RuntimeError, match=message) as raised:
        again.load_state_dict(state)
    assert "Missing" not in str(raised.value)
    assert len(str(raised.value).splitlines()) == 2  # torch's own line, and ours


def test_a_trained_layer_does_not_load_a_frozen_state(layer):
    sizes = layer.in_features, layer.out_features, True, layer.group_size
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"latent"'):
        FDBLinear(*sizes).load_state_dict(layer.state_dict())
    assert not hasattr(FDBLinear(*sizes), "alpha")


@pytest.mark.parametrize(
    "cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda x: x.to(torch.bfloat16)]
)
def test_a_cast_leaves_bits_and_scales(layer, cast):
    state = layer.state_dict()
    other = cast(copy.deepcopy(layer))
    for name in ("planes", "alpha"):
        assert torch.equal(other.state_dict()[name], state[name])
    x = normal(3, layer.in_features).to(other.bias.dtype)
    assert other(x).dtype == x.dtype
    assert torch.equal(layer.tiles, other.tiles)
    assert layer.tiles is not other.tiles


def test_as_a_dense_layer(layer):
    dense = layer.to_linear()
    assert torch.equal(dense.weight, layer.quantized().dequantize())
    x = normal(3, layer.in_features)
    torch.testing.assert_close(dense(x), layer(x))


# Rows of 8 bits -----------------------------------------------------------------------------------


def test_rows_of_8_bits(layer):
    x = normal(2, 3, layer.in_features)
    floats = layer(x)
    with torch.no_grad():
        assert layer.freeze("int8") is layer
        found = layer(x)
        packed = ops.FDBPacked.from_words(layer.planes, layer.alpha, layer.in_features)
        rows = ops.fdb_quantize(x, layer.group_size)
        assert torch.equal(found, ops.fdb_matmul(rows, packed, layer.bias))
    assert not torch.equal(found, floats)
    # 127 steps of half the largest number: about a hundredth.
    assert (found - floats).norm() < 0.02 * floats.norm()
    assert "activations=int8" in repr(layer)
    # It stays so, until told otherwise.
    assert layer.freeze().activations == "int8"
    layer.activations = None
    assert torch.equal(layer(x), floats)


def test_8_bits_from_the_start():
    torch.manual_seed(0)
    trained = FDBLinear.from_linear(nn.Linear(64, 8), 32)
    x = normal(3, 64).requires_grad_()
    trained.activations = "int8"
    trained(x).sum().backward()  # until it is frozen it learns
    model = nn.Sequential(trained, nn.Linear(8, 2))
    assert freeze_fdb_(model, "int8") == 1
    again = like(trained, activations="int8")
    again.load_state_dict(trained.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), trained(x))
    with pytest.raises(ValueError, match="int8 activations have no gradient and x needs one"):
        trained(x)
    with pytest.raises(ValueError, match="scales or bias need one"):
        trained(x.detach())


def test_activations_that_there_are_not():
    for make in (
        lambda: FDBLinear(64, 3, activations="int4"),
        lambda: FDBLinear(64, 3).freeze("int4"),
    ):
        with pytest.raises(ValueError, match="'int8' or None, got 'int4'"):
            make()


@pytest.mark.parametrize("activations", [None, "int8"])
def test_it_compiles_without_a_break(layer, activations):
    layer.freeze(activations).requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (3, 4):
        x = normal(m, layer.in_features)
        torch.testing.assert_close(compiled(x), layer(x))
