"""Mixtures of experts: dispatch against a loop, capacities by hand, balance losses in closed form,
and dense models made into mixtures."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from stillhouse.nn.moe import (
    ExpertChoice,
    Hash,
    MoE,
    Random,
    RouterInfo,
    SinkhornRouter,
    Soft,
    Switch,
    TopK,
    router_balance,
    router_z,
    upcycle_,
)
from stillhouse.nn.surgery import slice_linear, train_only

DOUBLE = torch.float64


def points(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


# Dispatch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "router",
    [lambda: TopK(1), lambda: TopK(3), Switch, lambda: ExpertChoice(1.5), SinkhornRouter, Random],
)
def test_it_is_the_sum_over_choices(gated, router):
    """Token by token: weights times experts, in value and gradient."""
    moe = MoE([gated() for _ in range(4)], router()).double()
    x = points(9, 6).requires_grad_()
    y = moe(x)
    info = moe.info
    want = torch.zeros(9, 6, dtype=DOUBLE)
    for t in range(9):
        for e, w in zip(info.index[t].tolist(), info.weight[t], strict=True):
            if e >= 0:
                want[t] += w * moe.experts[e](x[t])
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    found, expected = (
        torch.autograd.grad(each.square().sum(), x, retain_graph=True)[0] for each in (y, want)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert info.load.tolist() == [int((info.index == e).sum()) for e in range(4)]
    assert int(info.dropped) == 0


def test_leading_dimensions_and_padding(gated):
    moe = MoE([gated() for _ in range(3)], TopK(2)).double()
    x = points(2, 5, 6)
    flat = moe(x.flatten(0, 1))
    torch.testing.assert_close(moe(x), flat.view(2, 5, 6))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    spoiled = x.masked_fill(~mask[..., None], float("nan"))
    y = moe(spoiled, mask=mask)
    torch.testing.assert_close(y[mask], flat.view(2, 5, 6)[mask])
    assert y[~mask].abs().max() == 0
    assert len(moe.info.index) == 7
    assert int(moe.info.load.sum()) == 14
    nothing = moe(spoiled, mask=torch.zeros_like(mask))
    assert nothing.abs().max() == 0
    assert router_balance(moe.info, "gshard").item() == 0


def test_one_expert_is_the_dense_layer(gated):
    expert, x = gated(), points(7, 6)
    for router in (TopK(1), Switch(), SinkhornRouter(), ExpertChoice(1.0), Random(1)):
        moe = MoE([expert], router).double()
        torch.testing.assert_close(moe(x), expert(x), rtol=1e-12, atol=1e-12)


def test_shared_experts_get_every_token(gated):
    experts, x = [gated() for _ in range(4)], points(7, 6)
    moe = MoE(experts, TopK(2), shared=1).double()
    alone = MoE(experts[1:], TopK(2)).double()
    torch.testing.assert_close(moe(x), alone(x) + experts[0](x))
    assert moe.info.load.numel() == 3


def test_experts_that_are_given(gated):
    experts, x = [gated() for _ in range(3)], points(4, 6)
    moe = MoE(experts, None)
    index = torch.tensor([2, 0, -1, 2])
    want = torch.stack([experts[2](x[0]), experts[0](x[1]), torch.zeros(6), experts[2](x[3])])
    torch.testing.assert_close(moe(x, index=index), want)
    assert moe.info.load.tolist() == [1, 0, 2]
    batch = moe(x.view(2, 2, 6), index=index.view(2, 2))
    torch.testing.assert_close(batch.view(4, 6), want)
    masked = moe(x, mask=torch.tensor([True, False, True, True]), index=index)
    torch.testing.assert_close(masked, want * torch.tensor([[1.0], [0], [0], [1]]))


def test_a_split_layer_is_the_layer(gated):
    """Inner units dealt out to experts, all of which every token gets: their sum is the layer."""
    dense, x = gated(6, 12), points(8, 6)
    dense.down_proj.bias.data.zero_()
    parts = torch.randperm(12).view(3, 4)
    moe = MoE([_units(dense, part) for part in parts], None)
    found = moe(x, index=torch.arange(3).expand(8, 3))
    torch.testing.assert_close(found, dense(x), rtol=1e-12, atol=1e-12)


def test_gathered_units_are_masked_ones(gated):
    """An expert of half the units and a core that all share, by the expert of each token."""
    dense, x = gated(6, 12), points(8, 6)
    dense.down_proj.bias.data.zero_()
    core, own = torch.arange(3), torch.arange(3, 12).view(3, 3)
    experts = [_units(dense, part) for part in (core, *own)]
    index = torch.randint(3, (8,))
    found = MoE(experts, None, shared=1)(x, index=index)
    inner = nn.functional.silu(dense.gate_proj(x)) * dense.up_proj(x)
    mask = torch.zeros(3, 12, dtype=DOUBLE)
    mask[:, core] = 1
    mask.scatter_(1, own, 1.0)
    want = dense.down_proj(inner * mask[index])
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    # One expert of all units is the layer itself.
    whole = MoE([_units(dense, torch.arange(12))], None)
    torch.testing.assert_close(whole(x, index=torch.zeros(8, dtype=torch.int64)), dense(x))


def _units(dense, kept):
    part = copy.deepcopy(dense)
    part.gate_proj = slice_linear(dense.gate_proj, rows=kept)
    part.up_proj = slice_linear(dense.up_proj, rows=kept)
    part.down_proj = slice_linear(dense.down_proj, columns=kept)
    return part


def test_after_a_call_it_can_be_copied(gated):
    moe = MoE([gated() for _ in range(2)], TopK(1, noise=0.1)).double()
    x = points(5, 6)
    y = moe(x)
    again = pickle.loads(pickle.dumps(copy.deepcopy(moe)))
    assert again.info is None
    moe.eval(), again.eval()
    torch.testing.assert_close(again(x), moe(x))
    y.sum().backward()


# Capacity -----------------------------------------------------------------------------------------


def test_one_choice_beyond_the_capacity_is_dropped(steered):
    moe = steered(4, Switch(), capacity=1.0)
    x = torch.tensor([[5.0, 0, 0, 0]] * 4, dtype=DOUBLE)
    y = moe(x)
    assert y[0, 0].item() == pytest.approx(5 * moe.info.probs[0, 0].item())
    assert y[1:].abs().max() == 0
    assert int(moe.info.dropped) == 3
    assert moe.info.load.tolist() == [4, 0, 0, 0]


def test_two_choices_beyond_the_capacity(steered):
    """Both choices in common: only the first token gets anything."""
    moe = steered(4, TopK(2), capacity=0.5)
    y = moe(torch.tensor([[5.0, 4, 0, 0]] * 4, dtype=DOUBLE))
    assert y[0].abs().max() > 0
    assert y[1:].abs().max() == 0
    assert int(moe.info.dropped) == 6


def test_the_choice_that_is_left_has_weight_one(steered):
    moe = steered(5, TopK(2), capacity=0.625)
    x = 4.0 * torch.eye(5, dtype=DOUBLE)[1:]
    x[:, 0] = 5
    y = moe(x)
    assert int(moe.info.dropped) == 3
    torch.testing.assert_close(y[1:], x[1:] * torch.tensor([[3.0], [4], [5]], dtype=DOUBLE))
    assert moe.info.weight[1:].tolist() == [[0, 1]] * 3
    assert 0 < float(moe.info.weight[0, 1].detach()) < 1


def test_first_choices_come_before_second_ones(steered):
    """Token 0's second choice is token 1's first: with room for one, token 1 has it."""
    moe = steered(2, TopK(2), capacity=0.5)
    moe(torch.tensor([[5.0, 4], [0, 3]], dtype=DOUBLE))
    assert (moe.info.weight > 0).tolist() == [[True, False], [True, False]]


def test_an_expert_computes_no_more_than_its_capacity(steered):
    moe = steered(4, Switch(), capacity=2.0)
    seen = []
    moe.experts[0].register_forward_hook(lambda module, args, out: seen.append(len(out)))
    moe(torch.tensor([[5.0, 0, 0, 0]] * 4, dtype=DOUBLE))
    assert seen == [2]


def test_capacity_that_is_never_reached_changes_nothing(gated):
    moe = MoE([gated() for _ in range(3)], TopK(2)).double()
    x = points(9, 6)
    free = moe(x)
    moe.capacity = 3.0
    torch.testing.assert_close(moe(x), free)


# Balance ------------------------------------------------------------------------------------------


def info_of(logits, k, weight=None):
    probs = logits.softmax(-1)
    index = probs.topk(k, -1).indices
    weight = probs.gather(-1, index) if weight is None else weight
    load = index.flatten().bincount(minlength=logits.shape[-1])
    return RouterInfo(logits, probs, index, weight, load, torch.tensor(0))


@pytest.mark.parametrize(("kind", "k", "value"), [
    ("gshard", 1, 1.0), ("switch", 1, 1.0), ("deepseek", 1, 1.0),
    ("gshard", 2, 1.0), ("switch", 2, 2.0), ("deepseek", 2, 1.0),
])  # fmt: skip
def test_even_probabilities(kind, k, value):
    found = router_balance(info_of(torch.zeros(6, 4), k), kind)
    assert float(found) == pytest.approx(value)
    assert float(0.01 * found) == pytest.approx(0.01 * value)


@pytest.mark.parametrize("kind", ["gshard", "switch", "deepseek"])
def test_collapse_onto_one_expert(kind):
    logits = torch.full((6, 4), -1e4)
    logits[:, 2] = 0
    assert float(router_balance(info_of(logits, 1), kind)) == pytest.approx(4)


def test_balance_by_hand():
    """Three tokens, three experts, two choices; counts have no gradient."""
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.1, 0.5, 0.4]], dtype=DOUBLE)
    logits = probs.log().requires_grad_()
    info = info_of(logits, 2)
    # First choices: 2, 1, 0; both: 2, 2, 2.
    mean = probs.mean(0)
    gshard = 3 * (2 / 3 * mean[0] + 1 / 3 * mean[1])
    assert float(router_balance(info, "gshard").detach()) == pytest.approx(float(gshard))
    assert float(router_balance(info, "switch").detach()) == pytest.approx(2.0)
    router_balance(info, "gshard").backward()
    share = torch.tensor([2.0, 1.0, 0.0], dtype=DOUBLE)
    slope = probs * (share - (probs * share).sum(-1, keepdim=True)) / 3
    torch.testing.assert_close(logits.grad, slope)
    importance = torch.stack([
        probs[0, 0] + probs[1, 0], probs[0, 1] + probs[2, 1], probs[1, 2] + probs[2, 2]
    ])  # fmt: skip
    variation = importance.var(correction=0) / importance.mean() ** 2
    found = router_balance(info, "importance").detach()
    torch.testing.assert_close(found, variation, rtol=1e-8, atol=0)


def test_even_importance_is_nothing():
    info = info_of(10 * torch.eye(4, dtype=DOUBLE), 1)
    assert float(router_balance(info, "importance")) == 0


def test_dropped_choices_still_count(steered):
    moe = steered(2, Switch(), capacity=0.5)
    moe(torch.tensor([[9.0, 0], [9, 0], [9, 0], [0, 9]], dtype=DOUBLE))
    assert int(moe.info.dropped) == 2
    probs = moe.info.probs.detach().mean(0)
    want = 2 * (0.75 * probs[0] + 0.25 * probs[1])
    assert float(router_balance(moe.info, "switch").detach()) == pytest.approx(float(want))


def test_z():
    assert float(router_z(info_of(torch.zeros(5, 4), 1))) == pytest.approx(math.log(4) ** 2)
    assert round(math.log(4) ** 2, 4) == 1.9218
    logits = points(6, 3)
    want = torch.stack([row.exp().sum().log() ** 2 for row in logits]).mean()
    torch.testing.assert_close(router_z(info_of(logits, 1)), want)


@pytest.mark.parametrize(("router", "kind", "message"), [
    (lambda: TopK(1), "shazeer", "kind must be one of gshard"),
    (lambda: TopK(1), "load", "needs a router with normal noise"),
    (Soft, "gshard", "needs choices and probabilities"),
    (Random, "switch", "needs choices and probabilities"),
])  # fmt: skip
def test_balance_of_what_is_not_there(gated, router, kind, message):
    moe = MoE([gated() for _ in range(3)], router()).double()
    moe(points(1, 4, 6))
    with pytest.raises(ValueError, match=message):
        router_balance(moe.info, kind)
    if kind == "switch":
        with pytest.raises(ValueError, match="no logits"):
            router_z(moe.info)


# Upcycling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_an_upcycled_model_computes_what_it_did(llama, k):
    model = llama(3)
    ids = torch.arange(11)[None]
    with torch.no_grad():
        before = model(ids).logits
        report = upcycle_(model, TopK(k), layers="all")
        after = model(ids).logits
    assert (after - before).abs().max() < 1e-6 * before.abs().max()
    assert [row.after for row in report] == ["MoE"] * 3
    assert report[0].parameters_after == 4 * report[0].parameters_before + 4 * 32


def test_a_single_unscaled_choice_does_not(llama):
    model = llama(2)
    ids = torch.arange(11)[None]
    with torch.no_grad():
        before = model(ids).logits
        upcycle_(model, Switch())
        assert (model(ids).logits - before).abs().max() > 1e-2


@pytest.mark.parametrize(("layers", "numbers"), [
    ("alternate", [0, 2, 4]), ("first_half", [0, 1]), ("second_half", [2, 3, 4]),
    ("all", [0, 1, 2, 3, 4]), ([3, 1], [3, 1]),
])  # fmt: skip
def test_which_layers(llama, layers, numbers):
    model = llama(5)
    report = upcycle_(model, TopK(1), layers=layers, experts=2)
    assert [row.path for row in report] == [f"model.layers.{i}.mlp" for i in numbers]
    is_mixture = [isinstance(layer.mlp, MoE) for layer in model.model.layers]
    assert is_mixture == [i in numbers for i in range(5)]


def test_only_experts_and_routers_learn(llama):
    model = llama(2)
    upcycle_(model, TopK(2), layers=[1])
    train_only(model, ["*.experts.*", "*.router.*"])
    ids = torch.arange(30)[None]
    loss = model(ids, labels=ids).loss
    loss = loss + 0.01 * router_balance(model.model.layers[1].mlp.info, "gshard")
    loss.backward()
    learned = {name for name, each in model.named_parameters() if each.grad is not None}
    prefix = "model.layers.1.mlp."
    names = {f"{prefix}router.weight"} | {
        f"{prefix}experts.{e}.{part}_proj.weight"
        for e in range(4)
        for part in ("gate", "up", "down")
    }
    assert {name for name, each in model.named_parameters() if each.requires_grad} == names
    assert learned <= names
    assert model.model.layers[1].mlp.router.weight.grad.abs().sum() > 0


def test_routers_and_noise_differ(llama):
    model, other, dense = llama(2), llama(2), llama(2)
    upcycle_(model, TopK(2, noise="gumbel"), layers="all", noise=0.1, seed=3)
    upcycle_(other, TopK(2, noise="gumbel"), layers="all", noise=0.1, seed=3)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    first, second = (layer.mlp for layer in model.model.layers)
    assert not torch.equal(first.router.weight, second.router.weight)
    weights = [expert.up_proj.weight for expert in first.experts]
    assert not torch.equal(weights[0], weights[1])
    base = dense.model.layers[0].mlp.up_proj.weight
    ratio = (weights[0] - base).std() / base.std()
    assert float(ratio) == pytest.approx(0.1, rel=0.1)
    draws = [
        torch.rand(3, generator=each.router.generator(torch.device("cpu")))
        for each in (first, second)
    ]
    assert not torch.equal(*draws)


@pytest.mark.parametrize(("options", "message"), [
    (dict(layers="sparse"), "layers must be alternate"),
    (dict(layers=[2]), "layer 2 does not exist: the model has 2 blocks"),
    (dict(match="ffn"), "no module of LlamaDecoderLayer matches 'ffn'"),
    (dict(experts=0), "expected at least one expert"),
    (dict(router=TopK(5)), "expected 1 <= k <= 4 experts"),
    (dict(router=ExpertChoice()), "ExpertChoice looks at later tokens"),
    (dict(router=Soft()), "Soft looks at later tokens"),
])  # fmt: skip
def test_models_that_cannot_be_upcycled(llama, options, message):
    options = dict(router=TopK(2)) | options
    with pytest.raises(ValueError, match=message):
        upcycle_(llama(2), **options)


def test_routers_that_see_ahead_where_it_is_allowed(llama):
    assert upcycle_(llama(2), Soft(), sees_ahead=True)


@pytest.mark.parametrize(("options", "message"), [
    (dict(experts=[]), "a mixture needs at least one expert"),
    (dict(router=TopK(3)), "expected 1 <= k <= 2 experts, got k = 3"),
    (dict(shared=2), "expected 0 <= shared < 2 experts, got 2"),
    (dict(capacity=0.0), "capacity is a positive factor"),
    (dict(capacity=1.0, router=ExpertChoice()), "ExpertChoice has no capacity"),
    (dict(experts=[nn.Linear(2, 2), nn.Linear(2, 2, bias=False)]), "parameters of the same shapes"),
    (dict(experts=[nn.Identity(), nn.Identity()]), "Identity does not say how wide"),
])  # fmt: skip
def test_mixtures_that_cannot_be(options, message):
    given = dict(experts=[nn.Linear(2, 2), nn.Linear(2, 2)], router=TopK(1)) | options
    with pytest.raises(ValueError, match=message):
        MoE(**given)


def test_calls_that_cannot_be():
    experts = [nn.Linear(2, 2), nn.Linear(2, 2)]
    x = torch.ones(3, 2)
    moe = MoE(experts, TopK(1))
    with pytest.raises(ValueError, match="a router belongs to one MoE"):
        MoE(experts, moe.router)
    with pytest.raises(ValueError, match="TopK chooses itself"):
        moe(x, index=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask must be bool \(3,\)"):
        moe(x, mask=torch.ones(3))
    with pytest.raises(ValueError, match="logits are NaN"):
        moe(x * float("nan"))
    with pytest.raises(ValueError, match="every call needs index="):
        MoE(experts, None)(x)
    with pytest.raises(ValueError, match=r"experts are 0 to 1 \(-1 = none\), got 0 to 2"):
        MoE(experts, None)(x, index=torch.tensor([0, 2, 1]))
    hashed = MoE(experts, Hash(torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="the table is for 2 ids, got 2"):
        hashed(x, index=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="Hash routes by token ids"):
        hashed(x)
