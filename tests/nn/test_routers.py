"""Routers: closed forms, laws of their noise, and what they must not depend on."""

import math

import pytest
import torch
from torch import nn

from stillhouse.nn.moe import (
    ExpertChoice,
    Hash,
    MoE,
    Random,
    SinkhornRouter,
    Soft,
    Switch,
    TopK,
    router_balance,
)

DOUBLE = torch.float64


def points(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def built(router, width=5, experts=4, seed=0):
    router.build(torch.empty(0, dtype=DOUBLE), width, experts, seed)
    if getattr(router, "weight", None) is not None:
        router.weight.data = points(*router.weight.shape, seed=9)
    return router


def test_renormalised_weights_are_the_softmax_of_the_chosen(steered):
    x = points(9, 4)
    moe = steered(4, TopK(2))
    moe(x)
    top = x.topk(2, -1)
    assert torch.equal(moe.info.index, top.indices)
    torch.testing.assert_close(moe.info.weight.detach(), top.values.softmax(-1), rtol=0, atol=1e-15)
    plain = steered(4, TopK(2, renormalize=False))
    plain(x)
    torch.testing.assert_close(plain.info.weight, x.softmax(-1).gather(-1, top.indices))
    torch.testing.assert_close(plain.info.logits.detach(), x)


def test_logits_are_float32_in_any_model():
    moe = MoE([nn.Linear(5, 5) for _ in range(4)], TopK(2)).bfloat16()
    x = torch.randn(6, 5).bfloat16()
    assert moe(x).dtype == torch.bfloat16
    assert moe.info.logits.dtype == torch.float32
    torch.testing.assert_close(
        moe.info.logits, x.float() @ moe.router.weight.float().T, rtol=1e-6, atol=1e-7
    )
    with torch.autocast("cpu", torch.bfloat16):
        moe = MoE([nn.Linear(5, 5) for _ in range(4)], TopK(2))
        moe(x.float())
    assert moe.info.logits.dtype == torch.float32
    torch.testing.assert_close(
        moe.info.logits, x.float() @ moe.router.weight.T, rtol=1e-6, atol=1e-7
    )


def test_gradient_of_a_switch(gated):
    """Through the one weight, to the router's parameters and to the inputs."""
    moe = MoE([gated() for _ in range(3)], Switch()).double()
    moe.router.weight.data = points(3, 6)
    x = points(4, 6, seed=2).requires_grad_()
    weight = moe.router.weight

    def call(x, weight):
        return torch.func.functional_call(moe, {"router.weight": weight}, (x,))

    assert torch.autograd.gradcheck(call, (x, weight))
    (gradient,) = torch.autograd.grad(moe(x).sum(), weight)
    assert gradient.abs().sum() > 0


def test_jitter_is_of_the_inputs(steered):
    moe = steered(3, Switch(jitter=0.1))
    x = torch.ones(4000, 3, dtype=DOUBLE)
    moe(x)
    logits = moe.info.logits.detach()
    assert 0.9 <= float(logits.min()) < 0.901
    assert 1.099 < float(logits.max()) <= 1.1
    moe.eval()
    moe(x)
    assert torch.equal(moe.info.logits.detach(), x)


def test_normal_noise(steered):
    """Of the width asked for, in training alone; weights are the softmax over the noisy chosen."""
    moe = steered(4, TopK(2, noise=0.5))
    x = points(5000, 4)
    moe(x)
    used = moe.info.probs.detach().log()
    noise = (used - used.mean(-1, keepdim=True)) - (x - x.mean(-1, keepdim=True))
    # Of four draws less their mean: variance 3/4.
    assert float(noise.std()) == pytest.approx(0.5 * 0.75**0.5, rel=0.02)
    torch.testing.assert_close(moe.info.weight.detach(), used.topk(2, -1).values.softmax(-1))
    torch.testing.assert_close(moe.info.logits.detach(), x)
    moe.eval()
    moe(x)
    assert torch.equal(moe.info.index, x.topk(2, -1).indices)
    assert moe.info.chance is None


def test_learned_noise_begins_at_softplus_of_zero():
    router = built(TopK(1, noise="learned"))
    x = points(4000, 5)
    routed = router(x)
    used = routed.probs.detach().log()
    logits = routed.logits.detach()
    noise = (used - used.mean(-1, keepdim=True)) - (logits - logits.mean(-1, keepdim=True))
    assert float(noise.std()) == pytest.approx((math.log(2) + 0.01) * 0.75**0.5, rel=0.03)
    routed.chance.sum(0)[0].backward()
    assert router.noise_weight.grad.abs().sum() > 0


def test_the_chance_to_be_chosen():
    """Against one's own noise drawn again, the others' as they were: closed form by hand, and the
    share of draws."""
    router = built(TopK(2, noise=0.7, seed=4))
    x = points(3, 5)
    routed = router(x)
    logits = routed.logits.detach()
    # The noise that this call drew.
    drawn = built(TopK(2, noise=0.7, seed=4)).generator(x.device)
    used = logits + 0.7 * torch.empty_like(logits).normal_(generator=drawn)
    draws = 0.7 * points(200_000, seed=1)
    for t in range(3):
        for e in range(4):
            others = torch.cat([used[t, :e], used[t, e + 1 :]]).sort(descending=True).values
            exact = 0.5 * (1 + math.erf(float(logits[t, e] - others[1]) / 0.7 / math.sqrt(2)))
            assert float(routed.chance[t, e].detach()) == pytest.approx(exact, abs=1e-12)
            share = (logits[t, e] + draws > others[1]).double().mean()
            assert float(share) == pytest.approx(exact, abs=0.01)
    info = MoE([nn.Linear(5, 5) for _ in range(4)], TopK(4, noise=0.7)).double()
    info(x)
    assert float(router_balance(info.info, "load")) == 0  # all are always chosen


def test_gumbel_noise_is_of_the_second_choice_alone(steered):
    """The first stays; the second is drawn in proportion to what is left."""
    moe = steered(4, TopK(2, noise="gumbel"))
    row = torch.tensor([2.0, 1.0, 0.5, 0.0], dtype=DOUBLE)
    moe(row.expand(40_000, 4))
    first, second = moe.info.index.unbind(-1)
    assert bool((first == 0).all())
    share = second.bincount(minlength=4) / 40_000
    want = torch.cat([torch.zeros(1), row[1:].softmax(0).float()])
    torch.testing.assert_close(share, want, rtol=0, atol=0.01)
    clean = row.softmax(0)
    want = torch.stack([clean[first], clean[second]], -1)
    torch.testing.assert_close(moe.info.weight.detach(), want / want.sum(-1, keepdim=True))
    assert moe.info.chance is None


@pytest.mark.parametrize(
    "make", [lambda: TopK(2, noise=0.3), lambda: TopK(2, noise="gumbel"), Random]
)
def test_draws_are_ones_own_and_can_be_gone_on_with(make):
    before = torch.get_rng_state()
    x = points(30, 5)
    one, two = built(make()), built(make())
    first = one(x).index
    assert torch.equal(first, two(x).index)
    second = one(x).index
    assert not torch.equal(first, second)
    three = built(make())
    three.load_state_dict(two.state_dict())
    assert torch.equal(three(x).index, second)
    assert not torch.equal(built(make(), seed=1)(x).index, first)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bias_chooses_and_does_not_weigh():
    router = built(TopK(2, sigmoid=True, scale=2.5, bias_speed=0.1))
    x = points(50, 5)
    router.bias[:] = torch.tensor([0.0, 0.3, -0.2, 0.5])
    index = router(x).index
    router.bias += 7.0
    assert torch.equal(router(x).index, index)
    scores = (x @ router.weight.T).sigmoid()
    want = (scores + router.bias).topk(2, -1).indices
    assert torch.equal(index, want)
    assert not torch.equal(index, scores.topk(2, -1).indices)
    moe = MoE([nn.Identity() for _ in range(4)], TopK(2, sigmoid=True, scale=2.5), width=5)
    moe.router.weight = router.weight
    y = moe(x)
    kept = scores.topk(2, -1).values
    torch.testing.assert_close(moe.info.weight, 2.5 * kept / kept.sum(-1, keepdim=True))
    torch.testing.assert_close(y, 2.5 * x)


def test_the_bias_evens_loads_out():
    router = built(TopK(1, bias_speed=0.05))
    router.weight.data[0] = 3 * router.weight[1]
    x = points(400, 5)
    router.update_bias(torch.tensor([9, 1, 1, 1]))
    torch.testing.assert_close(router.bias, torch.tensor([-0.05, 0.05, 0.05, 0.05]))
    loads = []
    for _ in range(60):
        load = router(x).index.flatten().bincount(minlength=4)
        loads.append(float(load.max()) / 100)
        router.update_bias(load)
    assert loads[-1] < 1.3 < loads[0]
    with pytest.raises(ValueError, match="this router has no bias"):
        TopK(1).update_bias(load)


def test_expert_choice():
    """Six tokens, three experts, c = 2: four tokens each, by its own ranking."""
    router = built(ExpertChoice(2.0), experts=3)
    x = points(6, 5)
    routed = router(x)
    probs = (x @ router.weight.T).softmax(-1)
    for e in range(3):
        tokens = (routed.index == e).any(-1).nonzero()[:, 0]
        assert tokens.tolist() == sorted(probs[:, e].topk(4).indices.tolist())
    weight = torch.where(routed.index >= 0, probs.gather(-1, routed.index.clamp(min=0)), 0)
    torch.testing.assert_close(routed.weight, weight)
    assert bool((routed.weight.diff(dim=-1) <= 0).all())
    assert (routed.index >= 0).sum() == 12


def test_hash_does_not_look_at_tokens(gated):
    table = torch.tensor([2, 0, 1, 0])
    moe = MoE([gated() for _ in range(3)], Hash(table)).double()
    ids = torch.tensor([3, 0, 2])
    x = points(3, 6)
    y = moe(x, index=ids)
    assert moe.info.index[:, 0].tolist() == [0, 2, 1]
    moe(points(3, 6, seed=5), index=ids)
    assert moe.info.index[:, 0].tolist() == [0, 2, 1]
    torch.testing.assert_close(y[1], moe.experts[2](x[1]))
    assert not [name for name, _ in moe.router.named_parameters()]
    with pytest.raises(ValueError, match="the table's experts must be 0 to 1, got 0 to 2"):
        MoE([gated() for _ in range(2)], Hash(table))
    with pytest.raises(ValueError, match=r"expected a table int64 \[V\]"):
        Hash(torch.zeros(3))


def test_random_experts_differ_and_are_even():
    routed = built(Random(2))(points(20_000, 5))
    assert bool((routed.index[:, 0] != routed.index[:, 1]).all())
    share = routed.index.flatten().bincount(minlength=4) / 40_000
    torch.testing.assert_close(share, torch.full((4,), 0.25), rtol=0, atol=0.01)
    assert routed.weight.unique().tolist() == [0.5]


def test_sinkhorn_plans_have_their_marginals():
    router = built(SinkhornRouter(epsilon=0.5, iterations=200))
    logits = 2 * points(12, 4)
    plan = router.plan(logits)
    torch.testing.assert_close(plan.sum(1), torch.ones(12, dtype=DOUBLE), rtol=0, atol=1e-4)
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 3.0, dtype=DOUBLE), rtol=0, atol=1e-4)
    # A plan of entropic transport is a diagonal scaling of e^(logits / epsilon).
    inner = plan.log() - logits / 0.5
    inner = inner - inner.mean(0) - inner.mean(1, keepdim=True) + inner.mean()
    assert inner.abs().max() < 1e-9


def test_sinkhorn_routing():
    """Even in training where the logits are not; by the logits alone afterwards."""
    router = built(SinkhornRouter(iterations=50))
    router.weight.data[0] += 1.0
    x = 0.1 * points(400, 5) + 0.5
    routed = router(x)
    load = routed.index.flatten().bincount(minlength=4)
    greedy = (x @ router.weight.T).argmax(-1).bincount(minlength=4)
    assert load.max() < 200 < greedy.max()
    probs = (x @ router.weight.T).softmax(-1)
    torch.testing.assert_close(routed.weight, probs.gather(-1, routed.index))
    routed.weight.sum().backward()
    assert router.weight.grad.abs().sum() > 0
    router.eval()
    assert torch.equal(router(x).index[:, 0], probs.argmax(-1))
    sigmoid = built(SinkhornRouter(sigmoid=True))(x)
    torch.testing.assert_close(sigmoid.weight, sigmoid.logits.sigmoid().gather(-1, sigmoid.index))
    # Better scores at even loads than any of many random even assignments.
    small = points(8, 4, seed=3)
    plan = built(SinkhornRouter(epsilon=0.05, iterations=500)).plan(small)
    best = float((plan * small).sum())
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        order = torch.randperm(8, generator=generator) // 2
        assert float(small[torch.arange(8), order].sum()) <= best + 0.05


def test_soft_with_one_slot_is_the_mean_token(gated):
    expert = gated()
    moe = MoE([expert], Soft()).double()
    x = points(7, 6)
    phi = moe.router.weight[0] / moe.router.weight[0].norm()
    a = (x / x.norm(dim=-1, keepdim=True) @ phi).softmax(0)
    want = expert((a[:, None] * x).sum(0)).expand(7, 6)
    torch.testing.assert_close(moe(x), want, rtol=1e-12, atol=1e-12)


def test_soft_by_hand(gated):
    """Y = B f(A^T X) of each sequence, padding aside; logits do not know the size of a token."""
    moe = MoE([gated() for _ in range(2)], Soft(slots=3)).double()
    moe.router.gain.data.fill_(4.0)
    x = points(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    y = moe(x.masked_fill(~mask[..., None], float("nan")), mask=mask)
    for g, n in ((0, 5), (1, 3)):
        rows = x[g, :n]
        phi = moe.router.weight / moe.router.weight.norm(dim=-1, keepdim=True)
        logits = 4 * rows / rows.norm(dim=-1, keepdim=True) @ phi.T
        slots = logits.softmax(0).T @ rows
        out = torch.cat([moe.experts[0](slots[:3]), moe.experts[1](slots[3:])])
        torch.testing.assert_close(y[g, :n], logits.softmax(1) @ out, rtol=1e-12, atol=1e-12)
    assert y[1, 3:].abs().max() == 0
    assert moe.info.load.tolist() == [6, 6]
    torch.testing.assert_close(moe.info.probs.sum(-1), torch.ones(8, dtype=DOUBLE))
    logits = moe.info.logits
    moe(x * torch.rand(2, 5, 1).add(0.5), mask=mask)
    torch.testing.assert_close(moe.info.logits, logits, rtol=1e-10, atol=1e-10)
    y.sum().backward()
    assert moe.router.gain.grad.abs() > 0
    empty = moe(x, mask=mask & torch.tensor([[True], [False]]))
    assert empty.isfinite().all()
    assert empty[1].abs().max() == 0


@pytest.mark.parametrize(("make", "message"), [
    (lambda: TopK(0), "expected k >= 1, got 0"),
    (lambda: TopK(noise="normal"), "noise must be a number, 'learned' or 'gumbel'"),
    (lambda: TopK(noise=-1.0), "noise must be a number"),
    (lambda: TopK(renormalize=False, scale=2.0), "needs renormalize=True"),
    (lambda: Switch(jitter=1.0), r"jitter must be in \[0, 1\)"),
    (lambda: ExpertChoice(0.0), "must be positive, got 0"),
    (lambda: SinkhornRouter(epsilon=0.0), "epsilon > 0"),
    (lambda: Soft(0), "expected slots >= 1"),
])  # fmt: skip
def test_routers_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
