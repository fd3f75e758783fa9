"""Residual quantizers as modules: what a call returns, of masks, depths, projections and dtypes."""

import copy

import pytest
import torch
from torch.nn.functional import linear

from stillhouse import ops
from stillhouse.nn import GroupedResidualVQ, ResidualVQ

PER_STAGE = {
    "projection": "per_stage",
    "codebook_dim": 4,
    "update": "gradient",
    "metric": "cosine",
}
KINDS = {
    "plain": {},
    "cosine": {"metric": "cosine"},
    "shared_projection": {"codebook_dim": 5},
    "per_stage": PER_STAGE,
    "shared_codebook": {"shared_codebook": True},
    "gradient": {"update": "gradient"},
}


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(**options):
    made = GroupedResidualVQ if "groups" in options else ResidualVQ
    return made(12, 16, 4, **{"kmeans_init": False, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_to_the_codes_agree(kind):
    module, x = quantizer(**KINDS[kind]).eval(), rows(2, 9, 12)
    found = module(x)
    with torch.no_grad():
        thin = module(x)
    for wanted, other in zip(found, thin, strict=True):
        torch.testing.assert_close(other, wanted)
    assert found.out.shape == x.shape
    assert found.codes.shape == (2, 9, 4)
    assert found.commit_loss.shape == (4,)
    assert (module.encode(x) == found.codes).all()
    torch.testing.assert_close(module.decode(found.codes), found.out)
    for one in (x[:1, :1], x[0], x[0, 0]):  # a frame of a stream, rows without items, a row
        wanted = module(one)
        assert wanted.out.shape == one.shape
        with torch.no_grad():
            for ours, expected in zip(module(one), wanted, strict=True):
                torch.testing.assert_close(ours, expected)
        assert (wanted.codes.view(-1, 4) == found.codes[0, : one[..., 0].numel()]).all()
    assert module(x[:0]).codes.shape == (0, 9, 4)


def test_by_hand():
    module, x = quantizer().eval(), rows(3, 7, 12)
    out, codes, loss = module(x)
    left = x
    for stage in range(4):
        table = module.codebooks[stage]
        nearest = torch.cdist(left, table).argmin(-1)
        assert (codes[..., stage] == nearest).all()
        left = left - table[nearest]
        torch.testing.assert_close(loss[stage], left.square().mean())
    torch.testing.assert_close(out, x - left)


def test_a_shared_projection_by_hand():
    module, x = quantizer(codebook_dim=5).eval(), rows(3, 7, 12)
    narrow = linear(x, module.into_weight[0], module.into_bias[0])
    expected = ops.rvq(narrow, module.codebooks)
    found = module(x)
    assert (found.codes == expected.codes).all()
    torch.testing.assert_close(
        found.out, linear(expected.out, module.out_of_weight[0], module.out_of_bias[0])
    )
    torch.testing.assert_close(found.commit_loss, expected.error.mean((0, 1)) / 5)
    latents = module.from_latents(narrow)
    torch.testing.assert_close(latents.out, found.out)


def test_groups_are_quantizers_of_their_own():
    module, x = quantizer(groups=3, codebook_dim=2, commitment_weight=0.5).eval(), rows(2, 9, 12)
    found = module(x)
    assert found.codes.shape == (3, 2, 9, 4)
    assert found.commit_loss.shape == (3, 4)
    assert module.codebooks.shape == (3, 4, 16, 2)
    torch.testing.assert_close(module.decode(found.codes), found.out)
    for group in range(3):
        alone = ResidualVQ(
            4, 16, 4, codebook_dim=2, kmeans_init=False, commitment_weight=0.5
        ).eval()
        names = "tables", "into_weight", "into_bias", "out_of_weight", "out_of_bias"
        alone.take_({name: getattr(module, name)[group, None] for name in names})
        expected = alone(x[..., 4 * group : 4 * group + 4])
        assert (found.codes[group] == expected.codes).all()
        torch.testing.assert_close(found.out[..., 4 * group : 4 * group + 4], expected.out)
        torch.testing.assert_close(found.commit_loss[group], expected.commit_loss)
    with torch.no_grad():
        assert (module.encode(x) == found.codes).all()
        assert (module(x).codes == found.codes).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_masked_does_not_matter(kind, training):
    x, mask = rows(3, 8, 12), torch.arange(8) < torch.tensor([8, 5, 1])[:, None]
    found = []
    for noise in (0.0, 3.0, torch.nan):
        module = quantizer(**KINDS[kind]).train(training)
        if kind == "plain":
            module = quantizer(kmeans_init=True, dead_code_threshold=0.2).train(training)
        given = torch.where(mask[..., None], x, x * 0 + noise).requires_grad_()
        result = module(given, mask=mask)
        (result.out.square().sum() + result.out.sum() + result.commit_loss.sum()).backward()
        state = {k: v for k, v in module.state_dict().items() if torch.is_tensor(v)}
        of_maps = [each.grad for each in module.parameters()]
        found.append([*result, given.grad, *of_maps, *state.values()])
        assert (given.grad[~mask] == 0).all()
        assert (result.codes[~mask] == -1).all()
        assert (result.out[~mask] == 0).all()
        assert result.commit_loss.isfinite().all()
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)
    if not training:
        alone = module(x[1:2, :5])
        assert (alone.codes == result.codes[1:2, :5]).all()
        whole = sum(
            len(part) * module(part[None]).commit_loss for part in (x[0], x[1, :5], x[2, :1])
        )
        torch.testing.assert_close(whole / mask.sum(), result.commit_loss)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_depths_are_those_of_separate_calls(kind, training):
    module, x, depth = quantizer(**KINDS[kind]).train(training), rows(4, 4, 12), [4, 1, 3, 2]
    state = copy.deepcopy(module.state_dict())
    found = module(x, num_quantizers=torch.tensor(depth))
    for item, stages in enumerate(depth):
        module.load_state_dict(state)
        alone = module(x[item], num_quantizers=stages)
        assert alone.codes.shape == (4, stages)
        assert (found.codes[item, :, :stages] == alone.codes).all()
        assert (found.codes[item, :, stages:] == -1).all()
        torch.testing.assert_close(found.out[item], alone.out)
    module.load_state_dict(state)
    by_row = torch.tensor(depth)[:, None].expand(4, 4).contiguous()
    assert (module(x, num_quantizers=by_row).codes == found.codes).all()
    assert (module.encode(x, num_quantizers=2).shape) == (4, 4, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_types_are_wide_inside(kind):
    module, x = quantizer(**KINDS[kind]).eval(), rows(2, 50, 12)
    exact = copy.deepcopy(module)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = copy.deepcopy(module).to(dtype)
        assert {t.dtype for t in (*narrow.parameters(), *narrow.buffers())} == {torch.float32}
        rounded = x.to(dtype)
        wide = exact(rounded.float())
        for found in (
            narrow(rounded),
            narrow.train()(rounded),
            torch.no_grad()(narrow.load_state_dict)(exact.state_dict()) and narrow.eval()(rounded),
        ):
            assert found.out.dtype == dtype
            assert (found.codes == wide.codes).all()
            torch.testing.assert_close(found.out, wide.out.to(dtype))
    wide = exact(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (module(x).codes == wide.codes).all()
        torch.testing.assert_close(module(x).out, wide.out)
    assert (copy.deepcopy(module).double()(x.double()).codes == wide.codes).all()


@pytest.mark.parametrize("grad", ["ste", "stage_sum"])
def test_the_jacobian(grad):
    module, x = quantizer(grad=grad).double().eval(), rows(5, 12).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x).out, x)
    unit = torch.eye(60).view(5, 12, 5, 12).double()
    torch.testing.assert_close(jacobian, unit * (4 if grad == "stage_sum" else 1))


def test_all_commitments_reach_x():
    module, x = quantizer(commitment_weight=0.5).eval(), rows(2, 9, 12).requires_grad_()
    _, codes, loss = module(x)
    for stage in range(4):
        (slope,) = torch.autograd.grad(loss[stage], x, retain_graph=True)
        left = x - module.decode(codes[..., : stage + 1])
        torch.testing.assert_close(slope, 0.5 * 2 * left / x.numel())


def test_weights_of_commitment_and_tables():
    x = rows(2, 9, 12)
    slopes = {}
    for weights in ((1.0, 1.0), (0.25, 1.0), (0.5, 0.0)):
        module = quantizer(
            update="gradient", commitment_weight=weights[0], codebook_weight=weights[1]
        )
        given = x.clone().requires_grad_()
        loss = module(given).commit_loss.sum()
        loss.backward()
        slopes[weights] = loss.detach(), given.grad, module.tables.grad
    one = slopes[1.0, 1.0]
    for (commitment, codebook), found in slopes.items():
        for ours, whole, factor in zip(found, one, (commitment, commitment, codebook), strict=True):
            torch.testing.assert_close(ours, factor * whole)


def test_frames_that_are_not_finite():
    for kmeans_init in (False, True):
        module, x = quantizer(kmeans_init=kmeans_init, dead_code_threshold=0.3), rows(2, 9, 12)
        x[0, 3, 5], x[1, 0, 0] = torch.nan, torch.inf
        broken = ~x.isfinite().all(-1)
        for _ in range(3):
            out, codes, loss = module(x)
            assert (codes[broken] == -1).all()
            assert out[broken].isnan().all()
            assert (codes[~broken] >= 0).all()
            assert out[~broken].isfinite().all()
            assert loss.isnan().all()
        for state in (module.tables, module.counts, module.sums, module.energy):
            assert state.isfinite().all()


def test_packed_tables_are_kept_while_they_stay():
    module, x = quantizer().eval(), rows(1, 3, 12)
    other = quantizer(seed=5).eval()

    def check():
        with torch.no_grad():
            assert (module(x).codes == ops.rvq_encode(x, module.codebooks)).all()

    check()
    kept = module._cached[2]
    check()
    assert module._cached[2] is kept
    module.load_state_dict(other.state_dict())
    check()
    module.tables.mul_(-1)
    check()
    module.train()(x)
    module.eval()
    check()
    module.tables = other.tables.flip(2)
    check()
    for again in (copy.deepcopy(module), module.to(torch.bfloat16), module.float()):
        with torch.no_grad():
            assert (again(x).codes == module(x).codes).all()
    with torch.inference_mode():
        fresh = quantizer().eval()
        assert (fresh(x).codes == ops.rvq_encode(x, fresh.codebooks)).all()
        fresh.tables.mul_(-1)
        assert (fresh(x).codes == ops.rvq_encode(x, fresh.codebooks)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_round(kind, tmp_path):
    options = {**KINDS[kind], "kmeans_init": None}
    module, x = quantizer(**options), rows(2, 30, 12)
    for seed in range(3):
        module(rows(2, 30, 12, seed=seed))
    torch.save(module.state_dict(), tmp_path / "state.pt")
    again = quantizer(**options, seed=3)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    found = [each(x) for each in (module, again)]  # a step more of both, with k-means in neither
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
    for (name, one), two in zip(
        module.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 5}, "groups divide dim"),
        ({"projection": "none", "codebook_dim": 4}, "need a projection"),
        ({"projection": "both"}, "projection must be one of none, shared, per_stage"),
        ({"metric": "l1"}, "metric must be one of l2, cosine"),
        ({"update": "adam"}, "update must be one of ema, gradient"),
        ({"grad": "none"}, "grad must be one of ste, rotation"),
        ({**PER_STAGE, "grad": "rotation"}, "grad must be one of ste, stage_sum with projections"),
        ({**PER_STAGE, "update": "ema"}, "learn by update='gradient'"),
        ({**PER_STAGE, "kmeans_init": True}, "without k-means"),
        ({**PER_STAGE, "shared_codebook": True}, "neither groups nor a shared table"),
        ({"decay": 1.0}, "0 <= decay < 1"),
        ({"epsilon": 0.0}, "epsilon > 0"),
        ({"quantizer_dropout": 1.5}, "quantizer_dropout <= 1"),
        ({"dead_code_threshold": 2.0}, "dead_code_threshold is a share"),
        ({"kmeans_iterations": 0}, "must be positive"),
        ({"seed": 2**63}, "seed must fit int64"),
        ({"update": "gradient", "commitment_weight": 0.0}, "not 0 where tables learn"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        quantizer(**options)


def test_tables_that_were_written_to_are_read_again():
    module, x = quantizer().eval(), rows(2, 9, 12)
    other = rows(*module.tables.shape, seed=7)
    expected = ops.rvq_encode(x, other[0])
    with torch.no_grad():
        before = module(x).codes
        module.tables.copy_(other)
        assert (module(x).codes == expected).all()
        module.tables.data.copy_(quantizer().tables)
        module.eval()
        assert (module(x).codes == before).all()
    assert (before != expected).any()


@pytest.mark.parametrize("shape", [(4,), (3, 5, 4), (2, 5, 3)])
def test_latents_of_other_shapes_are_refused(shape):
    module = GroupedResidualVQ(8, 16, 3, groups=2, kmeans_init=False)
    with pytest.raises(ValueError, match="latents must be"):
        module.from_latents(torch.zeros(shape))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: m(x[..., :-1]), ValueError, r"x must be \[..., 12\], got \(2, 9, 11\)"),
        (lambda m, x: m(x.double()), TypeError, "x is torch.float64 and the tables are"),
        (lambda m, x: m(x.long()), TypeError, "x is torch.int64"),
        (lambda m, x: m(x, num_quantizers=0), ValueError, "from 1 to 4, the number of codebooks"),
        (lambda m, x: m(x, num_quantizers=5), ValueError, "from 1 to 4, the number of codebooks"),
        (lambda m, x: m.encode(x, 5), ValueError, "from 1 to 4, the number of codebooks"),
        (lambda m, x: m(x, num_quantizers=torch.ones(9)), ValueError, "of items or rows"),
        (
            lambda m, x: m(x, num_quantizers=torch.tensor([4, 5])),
            ValueError,
            "num_quantizers must be from 0 to 4, got 4 to 5",
        ),
        (lambda m, x: m(x.sum()), ValueError, r"x must be \[..., 12\], got \(\)"),
        (lambda m, x: m(x, mask=torch.ones(2, 9)), TypeError, "mask must be bool"),
        (lambda m, x: m(x, mask=torch.ones(9, 2).bool()), ValueError, "mask must be of items"),
        (lambda m, x: m.decode(torch.zeros(3, 5).long()), ValueError, "Q from 1 to 4"),
        (lambda m, x: m.decode(torch.zeros(3, 0).long()), ValueError, "Q from 1 to 4"),
        (lambda m, x: m.from_latents(x[..., :5]), ValueError, r"latents must be \[..., 12\]"),
        (
            lambda m, x: m.load_state_dict({"tables": torch.zeros(1, 4, 16, 11)}, strict=False),
            RuntimeError,
            "size mismatch for tables",
        ),
    ],
)
def test_calls_that_are_refused(call, error, message, training):
    module = quantizer(kmeans_init=training).train(training)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            call(module, rows(2, 9, 12))
    assert module.begun != training  # nothing was begun before the check
