"""What `capture` collects, and where it stops."""

import pytest
import torch
from torch import nn

from stillhouse.train import capture

IDS = torch.arange(7)[None]


def test_outputs_are_the_hidden_states(llama):
    model = llama(3)
    paths = [f"model.layers.{i}" for i in range(3)]
    with capture(model, [*paths, "model.norm"]) as taps:
        found = model(IDS, output_hidden_states=True).hidden_states
    # Of transformers the last one is after the norm, those before are of the blocks.
    for path, want in zip([*paths[:2], "model.norm"], found[1:], strict=True):
        assert torch.equal(taps[path], want)
        assert not taps[path].requires_grad


def test_inputs_by_position_and_by_keyword(llama):
    model = llama(2)
    paths = ["model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp.down_proj"]
    with capture(model, paths, inputs=True, detach=False) as taps:
        states = model(IDS, output_hidden_states=True).hidden_states
    layer = model.model.layers[1]
    assert torch.equal(taps[paths[0]], states[1])
    assert torch.equal(taps[paths[1]], layer.input_layernorm(states[1]))
    assert taps[paths[2]].shape == (1, 7, 48)
    taps[paths[2]].sum().backward()
    assert layer.mlp.up_proj.weight.grad.abs().sum() > 0
    assert layer.mlp.down_proj.weight.grad is None


def test_the_forward_stops(llama):
    model = llama(3)
    ran = []
    model.model.layers[2].register_forward_hook(lambda *_: ran.append(2))
    model.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    with capture(model, "model.layers.1", stop_after="model.layers.1") as taps:
        model(IDS)
        ran.append("behind")
    assert ran == [1]
    assert taps["model.layers.1"].shape == (1, 7, 32)


def test_nothing_is_left_behind():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with capture(model, "0") as taps:
        model(torch.ones(1, 2))
    first = taps["0"]
    model(torch.zeros(1, 2))
    assert taps["0"] is first
    with pytest.raises(RuntimeError, match="ours"), capture(model, ["0"], stop_after="1"):
        raise RuntimeError("ours")
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_module_that_runs_twice_and_other_outputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.named = nn.Identity(), Named()

        def forward(self, x):
            return self.named(self.inner(self.inner(x) + 1))["states"]

    class Named(nn.Module):
        def forward(self, x):
            return {"count": 3, "states": x * 2}

    model = Twice()
    with capture(model, ["inner", "named"]) as taps:
        model(torch.ones(2))
    assert taps["inner"].tolist() == [2, 2]
    assert taps["named"].tolist() == [4, 4]


def test_bad_paths():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match="Sequential has no module 'mlp'"), capture(model, "mlp"):
        pass
    with (
        pytest.raises(ValueError, match="has no module '2'"),
        capture(model, "0", stop_after="2"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="the forward stopped after 0, before 1"),
        capture(model, "1", stop_after="0"),
    ):
        model(torch.ones(1, 2))
    silent = nn.Sequential()
    silent.add_module("none", _Nothing())
    with pytest.raises(ValueError, match="none gives no tensor"), capture(silent, "none"):
        silent(torch.ones(1))


class _Nothing(nn.Module):
    def forward(self, x):
        return None
