"""FSPAD against plain torch: the head, its loss, its files."""

import json
import math

import pytest
import torch
from torch.nn.functional import silu

from stillhouse.methods.speculative import (
    FSPADHead,
    draft_head_loss,
)
from stillhouse.methods.speculative.draft_head import HeadCache

SIZES = dict(hidden=16, ffn=24, heads=4, kv_heads=2)


def head_of(seed=0, **options):
    """In float64, and with a gate that is open."""
    head = FSPADHead(**SIZES | options, generator=torch.Generator().manual_seed(seed)).double()
    if head.gate is not None:
        generator = torch.Generator().manual_seed(seed + 1)
        torch.nn.init.normal_(head.gate.down.weight, std=0.3, generator=generator)
    return head.requires_grad_(False)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 9, 16, generator=generator, dtype=torch.float64)


# The head -----------------------------------------------------------------------------------------


def rotated(x, theta=10_000.0):
    """RoPE of [T, size] as complex numbers."""
    size = x.shape[1]
    angle = torch.arange(len(x)).double()[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def by_hand(head, f, e):
    """The equations, one sequence [T, D], one attention head after the other."""

    def norm(x, module):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight

    w = dict(head.named_parameters())
    a = torch.cat([e, f], -1) @ w["fuse.weight"].T + w["fuse.bias"]
    gate = silu(e @ w["gate.gate.weight"].T)
    h = a + (gate * (norm(a, head.gate.norm) @ w["gate.up.weight"].T)) @ w["gate.down.weight"].T
    q, k, v = (h @ w[f"attention.{name}.weight"].T for name in "qkv")
    mixed = []
    for i in range(4):
        own, shared = slice(4 * i, 4 * i + 4), slice(4 * (i // 2), 4 * (i // 2) + 4)
        scores = rotated(q[:, own]) @ rotated(k[:, shared]).T / 2
        hidden = torch.ones_like(scores).triu(1).bool()
        mixed.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, shared])
    r = h + torch.cat(mixed, -1) @ w["attention.o.weight"].T
    x = norm(r, head.mlp.norm)
    out = silu(x @ w["mlp.gate.weight"].T) * (x @ w["mlp.up.weight"].T) @ w["mlp.down.weight"].T
    return r + out[:, :16], r + out[:, 16:]


def test_the_head_is_its_equations(inputs):
    head = head_of()
    found = head(*inputs)
    for row in range(3):
        for mine, expected in zip(found, by_hand(head, *inputs[:, row]), strict=True):
            # RoPE's angles are float32, as in transformers.
            torch.testing.assert_close(mine[row], expected, atol=1e-6, rtol=1e-6)


def test_without_its_last_matrix_the_split_head_is_the_plain_one(inputs):
    head = head_of(fusion="linear")
    head.mlp.down.weight.zero_()
    for_logits, for_feedback = head(*inputs)
    assert torch.equal(for_logits, for_feedback)
    plain = head_of(fusion="linear", split=False)
    state = head.state_dict() | {"mlp.down.weight": torch.zeros(16, 24)}
    plain.load_state_dict(state)
    assert torch.equal(plain(*inputs)[0], for_logits)
    assert torch.equal(plain(*inputs)[1], for_logits)


def test_an_untrained_gate_is_closed(inputs):
    gated = FSPADHead(**SIZES).double()
    linear = FSPADHead(**SIZES, fusion="linear").double()
    state = {name: x for name, x in gated.state_dict().items() if not name.startswith("gate")}
    linear.load_state_dict(state)
    assert torch.equal(gated(*inputs)[0], linear(*inputs)[0])


def test_with_a_cache_it_is_the_same(inputs):
    head = head_of()
    whole, cache = head(*inputs), HeadCache()
    parts = [head(*inputs[:, :, piece], cache=cache) for piece in (slice(4), slice(4, 5))]
    # What was tried and forgotten leaves no trace.
    head(*inputs[:, :, :3], cache=cache)
    cache.truncate(5)
    parts.append(head(*inputs[:, :, 5:], cache=cache))
    assert cache.length == 9
    for made, expected in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(made, 1), expected, atol=1e-12, rtol=1e-12)


def test_a_cache_grows():
    head, cache = head_of(), HeadCache()
    x = torch.randn(1, 150, 16, dtype=torch.float64)
    whole = head(x, x)
    parts = [head(x[:, i : i + 25], x[:, i : i + 25], cache=cache) for i in range(0, 150, 25)]
    made = torch.cat([part[0] for part in parts], 1)
    torch.testing.assert_close(made, whole[0], atol=1e-12, rtol=1e-12)
    assert cache.room < 300
    with pytest.raises(ValueError, match=r"length in \[0, 150\], got 151"):
        cache.truncate(151)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(heads=3), "3 heads do not divide a width of 16: name a head_size"),
        (dict(heads=4, kv_heads=3), "kv_heads that divide the heads, got 4 and 3 of 4"),
        (dict(head_size=3), "an even head_size"),
        (dict(fusion="mlp"), "no fusion 'mlp': expected one of gated, linear"),
        (dict(ffn=0), "sizes >= 1, got 16, 0, 4, 2"),
    ],
)
def test_heads_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        FSPADHead(**SIZES | options)


def test_inputs_that_do_not_fit(inputs):
    head = head_of()
    with pytest.raises(ValueError, match="for features of width 16, got 8: was it trained for"):
        head(inputs[0, ..., :8], inputs[1, ..., :8])
    with pytest.raises(ValueError, match=r"embeddings \[B, T, D\], got \[3, 9, 16\] and \[3, 8"):
        head(inputs[0], inputs[1, :, :8])
    with pytest.raises(TypeError, match="the head is torch.float64, its features are torch.float3"):
        head(inputs[0].float(), inputs[1])


def test_a_saved_head_is_the_same(tmp_path, inputs):
    head = head_of()
    folder = head.save(tmp_path / "head")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "head.safetensors"]
    again = FSPADHead.load(folder)
    assert again.config == head.config
    for mine, other in zip(again(*inputs), head(*inputs), strict=True):
        assert torch.equal(mine, other)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"split": False}))
    with pytest.raises(ValueError, match="weights and config.json do not fit: size mismatch for"):
        FSPADHead.load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"vision": 1}))
    with pytest.raises(ValueError, match="unexpected keyword argument 'vision'"):
        FSPADHead.load(folder)
    (folder / "head.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no draft head: head.safetensors is missing"):
        FSPADHead.load(folder)


# The loss -----------------------------------------------------------------------------------------


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(1)
    made = torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.float64)
    for_logits, for_feedback, features = made
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    return for_logits.requires_grad_(), for_feedback.requires_grad_(), 2 * features, weight


def test_the_loss_is_its_equations(outputs):
    p, q, features, weight = outputs
    mask = torch.tensor([[True, True, False, True, True], [False, True, False, False, False]])
    parts = draft_head_loss(*outputs, mask, w_feature=0.7, w_logits=0.3)
    gap = (q - features).abs()
    smooth = torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean(-1)[mask].sum() / (5 + 1e-5)
    law, log_q = (features @ weight.T).softmax(-1), (p @ weight.T).log_softmax(-1)
    entropy = -(law * log_q).sum(-1)[mask].sum() / (5 + 1e-5)
    expected = 0.7 * smooth + 0.3 * entropy
    torch.testing.assert_close(parts["loss"], expected)
    torch.testing.assert_close(parts["feature"], smooth.detach())
    torch.testing.assert_close(parts["logits"], entropy.detach())
    accepted = torch.minimum(law, log_q.exp()).sum(-1)[mask].sum() / (5 + 1e-5)
    torch.testing.assert_close(parts["acceptance"], accepted.detach(), check_dtype=False)
    mine = torch.autograd.grad(parts["loss"], (p, q))
    for found, other in zip(mine, torch.autograd.grad(expected, (p, q)), strict=True):
        torch.testing.assert_close(found, other)
        assert found[~mask].abs().max() == 0


def test_alignment_is_partial(outputs):
    p, q, features, weight = outputs
    features.requires_grad_()
    weight.requires_grad_()
    parts = draft_head_loss(p, q, features, weight, w_logits=0)
    parts["loss"].backward()
    assert p.grad is None or p.grad.abs().max() == 0
    assert q.grad.abs().max() > 0
    q.grad = None
    draft_head_loss(p, q, features, weight, w_feature=0)["loss"].backward()
    assert q.grad is None or q.grad.abs().max() == 0
    assert p.grad.abs().max() > 0
    assert features.grad is None
    assert weight.grad is None


def test_at_the_targets_feature_the_cross_entropy_is_its_entropy(outputs):
    _, q, features, weight = outputs
    p = features.clone().requires_grad_()
    parts = draft_head_loss(p, q, features, weight, w_feature=0, w_logits=1)
    law = (features @ weight.T).softmax(-1)
    entropy = -(law * law.log()).sum(-1).mean()
    assert parts["loss"].item() == pytest.approx(entropy.item() * 10 / (10 + 1e-5), rel=1e-7)
    assert torch.autograd.grad(parts["loss"], p)[0].abs().max() < 1e-9
    assert parts["acceptance"].item() == pytest.approx(1, abs=1e-5)
    for seed in range(20):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.1
        other = draft_head_loss(features + noise, q, features, weight, w_feature=0, w_logits=1)
        assert other["loss"] > parts["loss"]


def test_where_nothing_counts_the_loss_is_nothing(outputs):
    mask = torch.zeros(2, 5, dtype=torch.bool)
    parts = draft_head_loss(*outputs, mask)
    assert all(part == 0 for part in parts.values())
    parts["loss"].backward()
    assert outputs[0].grad.abs().max() == outputs[1].grad.abs().max() == 0


def test_a_linear_layer_brings_its_bias(outputs):
    p, q, features, weight = outputs
    layer = torch.nn.Linear(4, 7).double()
    layer.weight.data = weight
    layer.bias.data = torch.randn(7, dtype=torch.float64)
    law = layer(features).softmax(-1)
    expected = -(law * layer(p).log_softmax(-1)).sum(-1).sum() / (10 + 1e-5)
    parts = draft_head_loss(p, q, features, layer, w_feature=0, w_logits=1)
    torch.testing.assert_close(parts["loss"], expected)


def test_losses_that_are_refused(outputs):
    p, q, features, weight = outputs
    with pytest.raises(ValueError, match=r"lm_head \[V, D\] with D = 4, got \[4, 7\]: is it the"):
        draft_head_loss(p, q, features, weight.T)
    with pytest.raises(ValueError, match=r"one shape \[..., D\]"):
        draft_head_loss(p, q, features[:, 1:], weight)
    with pytest.raises(ValueError, match="a bool mask"):
        draft_head_loss(p, q, features, weight, torch.ones(2, 5))
    with pytest.raises(ValueError, match="weights >= 0, got 1.0 and -1"):
        draft_head_loss(p, q, features, weight, w_logits=-1)
