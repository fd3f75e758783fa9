"""FSQ, ResidualFSQ and LFQ as modules: projections, masks, depths, losses, what they report."""

import copy
import math

import pytest
import torch

from stillhouse import ops
from stillhouse.nn import FSQ, LFQ, ResidualFSQ


def rows(*shape, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


EVERY = {
    "fsq": lambda dim=None: FSQ([8, 5, 5, 5], dim),
    "fsq of two": lambda dim=None: FSQ([2, 4], dim, 2, form="symmetric"),
    "residual": lambda dim=None: ResidualFSQ([8, 5, 5, 5], 3, dim),
    "lfq": lambda dim=None: LFQ(4, dim),
    "bsq": lambda dim=None: LFQ(4, dim, spherical=True),
}


@pytest.fixture(params=EVERY)
def make(request):
    return EVERY[request.param]


# All of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [None, 12])
def test_decoding_is_the_way_back(make, dim):
    module = make(dim)
    x = rows(3, 7, module.dim)
    found = module(x)
    assert found.out.shape == x.shape
    assert found.codes.shape[:2] == (3, 7)
    assert found.codes.dtype == torch.int64
    torch.testing.assert_close(module.decode(found.codes), found.out)
    assert torch.equal(module.encode(x), found.codes)
    row = module(x[1, 2])
    assert torch.equal(row.codes, found.codes[1, 2])


def test_gradients_reach_both_projections(make):
    module = make(12)
    x = rows(3, 7, 12).requires_grad_()
    module(x).out.square().sum().backward()
    assert x.grad.any()
    assert all(parameter.grad.any() for parameter in module.parameters())
    assert len(list(module.parameters())) == 4


def test_padding_does_not_matter(make):
    module, mask = make(12), torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:], mask[2] = False, False
    x = rows(3, 7, 12)
    expected = module(x)
    x[~mask] = torch.nan
    found = module(x.requires_grad_(), mask)
    assert torch.equal(found.codes[mask], expected.codes[mask])
    torch.testing.assert_close(found.out[mask], expected.out[mask])
    assert (found.codes[~mask] == -1).all()
    assert not found.out[~mask].any()
    found.out.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    assert not x.grad[~mask].any()


def test_frames_that_are_not_finite(make):
    module, x = make(12), rows(3, 7, 12)
    expected = module(x).codes
    x[1, 3, 5] = torch.inf
    found = module(x)
    assert (found.codes[1, 3] == -1).all()
    assert found.out[1, 3].isnan().all()
    found.codes[1, 3] = expected[1, 3]
    assert torch.equal(found.codes, expected)


def test_half_precision_has_the_codes_of_the_rounded_rows(make):
    module = make()
    x = rows(5, 40, module.dim, dtype=torch.bfloat16)
    expected = module(x.float())
    for found in (module(x), module.bfloat16()(x)):
        assert torch.equal(found.codes, expected.codes)
        assert found.out.dtype == torch.bfloat16
    x = x.half()
    assert torch.equal(module.half()(x).codes, module(x.float()).codes)


def test_its_parameters_are_its_seeds():
    before = torch.random.get_rng_state()
    first, again, other = FSQ([3, 3], 8), FSQ([3, 3], 8), LFQ(2, 8, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.project_in.weight, again.project_in.weight)
    assert not torch.equal(first.project_in.weight, other.project_in.weight)
    for module in (first, other):
        for layer in (module.project_in, module.project_out):
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                assert parameter.requires_grad
                assert 0 < parameter.abs().max() <= bound
            assert layer.weight.abs().max() > 0.7 * bound
    again.load_state_dict(first.state_dict())
    assert set(first.state_dict()) == {
        f"project_{side}.{part}" for side in ("in", "out") for part in ("weight", "bias")
    }
    assert not FSQ([3, 3]).state_dict()
    copy.deepcopy(first)(rows(1, 1, 8))


def test_compiled(make):
    torch._dynamo.reset()  # modules share a cache with others of their class
    module = make(12)
    plain = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for step in range(10):
        outcomes = []
        for each in (plain, compiled):
            own = rows(2, 6, 12, seed=step).requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=True):
                found = each(own, mask=torch.arange(6).expand(2, 6) < 5)
            loss = found.out.square().sum() + getattr(found, "loss", 0)
            loss.backward()
            outcomes.append((found.codes, own.grad))
        assert torch.equal(outcomes[0][0], outcomes[1][0])
        torch.testing.assert_close(outcomes[0][1], outcomes[1][1])
    assert module.metrics().keys() == plain.metrics().keys()
    torch.testing.assert_close(module.metrics()["entropy"], plain.metrics()["entropy"])


def test_what_it_reports():
    fsq = FSQ([3, 3])
    with pytest.raises(RuntimeError, match="metrics are of the last call, and there was none"):
        fsq.metrics()
    mask = torch.tensor([[True] * 4 + [False]])
    fsq(torch.tensor([[[-5.0, -5], [5, 5], [5, 5], [-5, -5], [0, 0]]]), mask)
    found = fsq.metrics()
    assert found["entropy"].shape == ()
    assert found["entropy"].item() == pytest.approx(math.log(2))
    assert found["perplexity"].item() == pytest.approx(2)
    assert found["dead"].item() == pytest.approx(7 / 9)
    two = FSQ([3], num_codebooks=2)
    two(torch.tensor([[[-5.0, 5]], [[5, 5]], [[0, 5]]]))
    torch.testing.assert_close(two.metrics()["perplexity"], torch.tensor([3.0, 1.0]).double())
    torch.testing.assert_close(two.metrics()["dead"], torch.tensor([0, 2 / 3]).double())
    lfq = LFQ(40)
    lfq(lfq.decode(torch.arange(8)))
    assert lfq.metrics()["perplexity"].item() == pytest.approx(8)


def test_signal_to_noise():
    module = ResidualFSQ([5, 5], 3)
    x, depth = rows(4, 50, 2), torch.tensor([1, 2, 3, 3])
    module(x, num_quantizers=depth)
    bounded = torch.tanh(x.double() * 0.8) / 0.8
    found = module.metrics()["snr_db"]
    for stage in range(3):
        there = bounded[depth > stage]
        part = ops.residual_fsq(x[depth > stage], [5, 5], stage + 1).out.double()
        ratio = there.square().sum() / (there - part).square().sum()
        assert found[stage].item() == pytest.approx(10 * math.log10(ratio), abs=1e-3)
    assert found[0] + 10 < found[1] < found[2] - 10  # 20 log10(5) = 14 dB a stage


# FSQ ----------------------------------------------------------------------------------------------


def test_narrower_rows_go_through_wider_layers():
    for module in (FSQ([8] * 3, 4), ResidualFSQ([8] * 3, 2, 4), LFQ(3, 4)):
        x = X.bfloat16()
        found, wide = module(x), module(x.float())
        assert found.out.dtype == torch.bfloat16
        assert torch.equal(found.codes, wide.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", [[2] * 10, [8, 5, 5, 5], [2, 3, 64]])
def test_every_code_comes_back(levels, dtype):
    module = FSQ(levels, form="symmetric", bound="clamp")
    codes = torch.arange(module.codebook_size)
    assert torch.equal(module.encode(module.decode(codes)[None].to(dtype))[0], codes)


def test_codebooks_are_quantized_apart():
    module, x = FSQ([8, 5], num_codebooks=3), rows(2, 5, 6)
    found = module(x)
    assert found.codes.shape == (2, 5, 3)
    for number in range(3):
        part = x[..., 2 * number : 2 * number + 2]
        alone = ops.fsq(part, [8, 5])
        assert torch.equal(found.codes[..., number], alone.codes)
        assert torch.equal(found.out[..., 2 * number : 2 * number + 2], alone.out)


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip("vector_quantize_pytorch")


@pytest.mark.parametrize("codebooks", [1, 2])
def test_fsq_beside_a_peer(peer, codebooks):
    theirs = peer.FSQ([8, 5, 6], dim=12, num_codebooks=codebooks)
    ours = FSQ([8, 5, 6], 12, codebooks)
    ours.load_state_dict(theirs.state_dict())
    x = rows(3, 100, 12, scale=2)
    out, codes = theirs(x)
    found = ours(x)
    assert torch.equal(found.codes, codes.long())
    torch.testing.assert_close(found.out, out)
    torch.testing.assert_close(ours.decode(codes.long()), theirs.indices_to_codes(codes))


# ResidualFSQ --------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [[2, 2, 2], [5, 3, 4, 8]])
def test_residual_fsq_beside_a_peer(peer, levels):
    theirs = peer.ResidualFSQ(levels=levels, dim=12, num_quantizers=3)
    ours = ResidualFSQ(levels, 3, 12)
    ours.load_state_dict(theirs.state_dict())
    x = rows(3, 100, 12, scale=2)
    out, codes = theirs(x)
    found = ours(x)
    same = (found.codes == codes).all(-1)
    assert same.float().mean() > 0.99
    torch.testing.assert_close(found.out[same], out[same])
    torch.testing.assert_close(ours.decode(codes), theirs.get_output_from_indices(codes))


def test_depths_of_a_call():
    module, x = ResidualFSQ([4, 4], 4, 6, quantizer_dropout=1.0), rows(3, 5, 6)
    whole = module.eval()(x)
    for training in (True, False):
        module.train(training)
        few = module(x, num_quantizers=2)
        assert torch.equal(few.codes, whole.codes[..., :2])
        torch.testing.assert_close(few.out, module.decode(whole.codes[..., :2]))
        depth = torch.tensor([1, 4, 3])
        mixed = module(x, num_quantizers=depth)
        for item, stages in enumerate(depth.tolist()):
            alone = module(x[item], num_quantizers=stages)
            assert torch.equal(mixed.codes[item, :, :stages], alone.codes)
            assert (mixed.codes[item, :, stages:] == -1).all()
            torch.testing.assert_close(mixed.out[item], alone.out)
        of_frames = module(x, num_quantizers=depth[:, None].expand(3, 5))
        assert torch.equal(of_frames.codes, mixed.codes)
    assert module.draws == 0
    assert torch.equal(module.train().encode(x), whole.codes)


def depths(module, calls, items):
    x = rows(items, 1, 1)
    return torch.stack([(module(x).codes[:, 0] >= 0).sum(-1) for _ in range(calls)])


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_dropped_quantizers(share):
    """A share of the items has each depth as often as any other; the rest has them all."""
    module = ResidualFSQ([3], 4, quantizer_dropout=share)
    found = depths(module, 40, 500)
    n = found.numel()
    expected = torch.full((4,), share / 4)
    expected[3] += 1 - share
    counts = torch.stack([(found == depth).sum() for depth in (1, 2, 3, 4)])
    deviation = (n * expected * (1 - expected)).sqrt()
    assert ((counts - n * expected).abs() < 5 * deviation).all()
    # Neither calls nor items know of each other.
    low = (found < 3).double()
    for pair in ((low[1:], low[:-1]), (low[:, 1:], low[:, :-1])):
        correlation = torch.corrcoef(torch.stack([each.flatten() for each in pair]))[0, 1]
        assert correlation.abs() < 5 * n**-0.5
    assert (depths(module.eval(), 2, 50) == 4).all()


def test_depths_of_large_seeds():
    found = [
        depths(ResidualFSQ([3], 4, quantizer_dropout=1.0, seed=seed), 2, 50)
        for seed in (5, 2**62, 2**63 + 5)
    ]
    assert (found[0] != found[1]).any()
    assert (found[2] <= 4).all()


def test_the_depths_of_a_resumed_run():
    words = dict(quantizer_dropout=0.5, seed=3)
    module, again = (ResidualFSQ([3], 4, **words) for _ in range(2))
    before = torch.random.get_rng_state()
    depths(module, 3, 50)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = ResidualFSQ([3], 4, quantizer_dropout=0.5, seed=4)
    for each in (again, other):
        each.load_state_dict(module.state_dict())
    expected = depths(module, 2, 50)
    assert torch.equal(depths(again, 2, 50), expected)
    assert not torch.equal(expected[0], expected[1])
    assert not torch.equal(depths(other, 2, 50), expected)


def test_dropped_quantizers_compiled():
    torch._dynamo.reset()
    module = ResidualFSQ([3], 4, quantizer_dropout=0.5)
    again = copy.deepcopy(module)
    expected = depths(module, 10, 20)
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(depths(compiled, 10, 20), expected)


# LFQ ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spherical", [False, True])
def test_lfq_beside_a_peer(peer, spherical):
    words = dict(spherical=spherical, diversity_gamma=0.7, commitment_loss_weight=0.25)
    theirs = peer.LFQ(codebook_size=2**5, dim=12, **words)
    ours = LFQ(
        5, 12, diversity=0.7, commitment_weight=0.25, inv_temperature=0.5, spherical=spherical
    )
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "mask"})
    x = rows(3, 100, 12)
    (out, codes, loss), parts = theirs(x, 0.5, return_loss_breakdown=True)
    found = ours(x)
    assert torch.equal(found.codes, codes.long())
    torch.testing.assert_close(found.out, out)
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(found.entropy.row, parts.per_sample_entropy)
    torch.testing.assert_close(found.entropy.mean, parts.batch_entropy)
    torch.testing.assert_close(found.commit_loss, parts.commitment)
    loss.backward()
    found.loss.backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    # With a mask, their mean distribution is each row's own.
    mask = torch.arange(100).expand(3, 100) < 80
    _, parts = theirs(x, 0.5, return_loss_breakdown=True, mask=mask)
    found = ours(x, mask)
    torch.testing.assert_close(found.entropy.row, parts.per_sample_entropy)
    torch.testing.assert_close(found.commit_loss, parts.commitment)
    assert parts.batch_entropy == parts.per_sample_entropy < found.entropy.mean


def test_losses_by_their_weights():
    x = rows(2, 30, 6)
    found = LFQ(6, entropy_weight=0.3, commitment_weight=0.5)(x)
    torch.testing.assert_close(found.loss, 0.3 * found.entropy.loss + 0.5 * found.commit_loss)
    torch.testing.assert_close(found.commit_loss, (x - found.out).square().mean())
    assert found.entropy == ops.lfq_entropy(x)
    alone = LFQ(6, entropy_weight=0.0, commitment_weight=0.5)(x)
    assert alone.entropy is None
    assert alone.loss == 0.5 * found.commit_loss
    sphere = LFQ(6, spherical=True)(3 * x)
    unit = x / x.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(sphere.commit_loss, (unit - sphere.out).square().mean())


def test_beyond_sixteen_bits_the_entropy_is_of_each():
    x = rows(2, 30, 18)
    assert LFQ(16).entropy_group == 16
    module = LFQ(18)
    assert module.entropy_group == 1
    assert "entropy_group=1" in repr(module)
    assert module(x).entropy == ops.lfq_entropy(x, group=1)
    assert LFQ(18, entropy_group=9)(x).entropy == ops.lfq_entropy(x, group=9)


def test_the_entropy_makes_codes_used():
    """A code for everything becomes all codes."""
    module, x = LFQ(3, 8, inv_temperature=5.0), rows(64, 4, 8)
    with torch.no_grad():
        module.project_in.bias.fill_(2.0)
    module(x)
    assert module.metrics()["perplexity"] < 1.5
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        module(x).loss.backward()
        optimizer.step()
    assert module.metrics()["perplexity"] > 7
    assert module.metrics()["dead"] == 0


X = rows(2, 5, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FSQ([8, 1]), ValueError, "two levels or more"),
        (lambda: FSQ([8, 2]), ValueError, "two levels need form='symmetric'"),
        (lambda: FSQ([8, 2.5]), TypeError, "levels must be ints"),
        (lambda: FSQ([8], form="odd"), ValueError, "form must be one of"),
        (lambda: FSQ([8], bound="odd"), ValueError, "bound must be one of"),
        (lambda: FSQ([8], num_codebooks=0), ValueError, "num_codebooks must be 1 or more, got 0"),
        (lambda: FSQ([8], 0), ValueError, "dim must be 1 or more, got 0"),
        (lambda: FSQ([8] * 3)(X), ValueError, r"x must be \[..., 3\], got \(2, 5, 4\)"),
        (lambda: FSQ([8] * 4)(X, torch.ones(2, 5)), TypeError, "mask must be bool"),
        (
            lambda: FSQ([8] * 4)(X, torch.ones(5, dtype=torch.bool)),
            ValueError,
            r"mask must have the rows. shape \(2, 5\)",
        ),
        (lambda: FSQ([8] * 3, 4)(X.double()), TypeError, "x is torch.float64 and the layers are"),
        (lambda: FSQ([8] * 3, 4)(X.long()), TypeError, "x is torch.int64 and the layers are"),
        (lambda: FSQ([8] * 4).decode(torch.tensor(4096)), ValueError, "from -1 to 4095"),
        (
            lambda: FSQ([8], num_codebooks=2).decode(torch.zeros(3, dtype=torch.int64)),
            ValueError,
            r"codes must be \[..., 2\], got \(3,\)",
        ),
        (lambda: ResidualFSQ([8], 0), ValueError, "num_quantizers must be 1 or more, got 0"),
        (lambda: ResidualFSQ([1], 2), ValueError, "two levels or more"),
        (lambda: ResidualFSQ([8], 2, grad="none"), ValueError, "grad must be one of ste"),
        (lambda: ResidualFSQ([8], 2, quantizer_dropout=1.5), ValueError, "is a share"),
        (
            lambda: ResidualFSQ([8] * 4, 2)(X, num_quantizers=3),
            ValueError,
            "num_quantizers must be from 1 to 2",
        ),
        (
            lambda: ResidualFSQ([8] * 4, 2)(X, num_quantizers=torch.ones(3, dtype=torch.int64)),
            ValueError,
            "num_quantizers must have the rows' shape",
        ),
        (
            lambda: ResidualFSQ([8] * 4, 2).decode(torch.zeros(1, 3, dtype=torch.int64)),
            ValueError,
            r"codes must be \[..., 2\] or fewer, got \(1, 3\)",
        ),
        (lambda: LFQ(0), ValueError, "from 1 to 63 bits, got 0"),
        (lambda: LFQ(64), ValueError, "from 1 to 63 bits, got 64"),
        (lambda: LFQ(8, entropy_group=9), ValueError, "entropy_group must be from 1 to 8 bits"),
        (lambda: LFQ(30, entropy_group=21), ValueError, "entropy_group must be from 1 to 20 bits"),
        (lambda: LFQ(8, entropy_weight=-1.0), ValueError, "weights must be 0 or more"),
        (lambda: LFQ(8, inv_temperature=0.0), ValueError, "inv_temperature positive"),
        (lambda: LFQ(8)(X), ValueError, r"x must be \[..., 8\]"),
        (lambda: LFQ(8).decode(torch.tensor(256)), ValueError, "codes must be from -1 to 255"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
