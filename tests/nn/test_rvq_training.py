"""How the tables of a residual quantizer learn: means, dead codes, k-means, depth, compiled."""

import copy

import pytest
import torch
import torch._dynamo.testing

from stillhouse.nn import GroupedResidualVQ, ResidualVQ, kmeans
from stillhouse.nn.codebooks import BEGUN, STEPS

DECAY = 0.9


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(**options):
    options = {"decay": DECAY, "kmeans_init": False, **options}
    return ResidualVQ(8, 16, 3, **options).train()


def residuals(x, codes, tables):
    """What each stage was given."""
    left = x.flatten(0, -2)
    for stage, code in enumerate(codes.flatten(0, -2).unbind(-1)):
        yield stage, code, left
        left = left - tables[stage][code]


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_means_by_hand(kind):
    module = quantizer(shared_codebook=kind == "shared")
    count = module.tables.shape[1]
    counts, sums = torch.zeros(count, 16), torch.zeros(count, 16, 8)
    for step in range(3):
        x, tables = rows(2, 50, 8, seed=step), module.codebooks.clone()
        found = module(x)
        moved = tables[:count].clone()
        counts, sums = DECAY * counts, DECAY * sums
        for stage, code, left in residuals(x, found.codes, tables):
            table = min(stage, count - 1)
            assert (torch.cdist(left, tables[stage]).argmin(-1) == code).all()
            counts[table] += (1 - DECAY) * code.bincount(minlength=16)
            sums[table].index_add_(0, code, (1 - DECAY) * left)
        used = counts > 0
        moved[used] = sums[used] / counts[used, None]
        torch.testing.assert_close(module.counts[0], counts)
        torch.testing.assert_close(module.sums[0], sums, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(module.tables[0], moved, atol=1e-5, rtol=1e-5)
        if kind == "separate":
            assert step or not used.all()  # codes that were never used stay
    assert module.progress[STEPS] == 3


def test_the_first_step_is_the_mean_of_what_was_given():
    module, x = quantizer(), rows(100, 8)
    codes = module(x).codes
    assert torch.allclose(module.counts[0, 0], (1 - DECAY) * codes[:, 0].bincount(minlength=16))
    for code in codes[:, 0].unique():
        expected = x[codes[:, 0] == code].mean(0)
        torch.testing.assert_close(module.codebooks[0, code], expected, atol=1e-5, rtol=1e-5)


def test_stages_that_were_not_asked_for_stay():
    module, x = quantizer(dead_code_threshold=0.3), rows(2, 50, 8)
    module(x)
    before = copy.deepcopy(module)
    module(x, num_quantizers=1)
    assert not torch.equal(module.tables[:, 0], before.tables[:, 0])
    for name in ("tables", "counts", "sums"):
        assert torch.equal(getattr(module, name)[:, 1:], getattr(before, name)[:, 1:])
    assert torch.equal(module.energy[..., 1:], before.energy[..., 1:])


def test_nothing_is_learnt_outside_of_training():
    module, x = quantizer(dead_code_threshold=0.3, kmeans_init=True), rows(2, 50, 8)
    state = copy.deepcopy(module.state_dict())
    module.eval()(x)
    module.train().encode(x)
    module.decode(torch.zeros(4, 3).long())
    module.from_latents(x)
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_the_backward_pass_has_the_tables_of_its_own_step():
    module, x = quantizer(dead_code_threshold=0.5), rows(2, 50, 8)
    frozen = copy.deepcopy(module).eval()
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    losses = [module(one).commit_loss.sum()]
    module(x)  # another step before the gradient of the first
    (losses[0] + frozen(two).commit_loss.sum()).backward()
    torch.testing.assert_close(one.grad, two.grad)


class TestDeadCodes:
    @pytest.mark.parametrize("shared", [False, True])
    def test_they_become_rows_of_the_batch_and_stay_so(self, shared):
        module = quantizer(dead_code_threshold=0.5, shared_codebook=shared)
        count = module.tables.shape[1]
        x = rows(2, 60, 8)
        far = 1000.0 + torch.arange(8.0)
        module.tables[0, :, 5] = far
        tables = module.codebooks.clone()
        codes = module(x).codes
        replaced = module.codebooks[:count, 5].clone()
        given = [left for *_, left in residuals(x, codes, tables)]
        for stage in range(count):
            among = torch.cat(given) if shared else given[stage]
            assert (among - replaced[stage]).abs().amax(-1).min() < 1e-5
        mean = module.counts[0, :, 5].clone()
        torch.testing.assert_close(module.sums[0, :, 5], mean[..., None] * replaced)
        # The same means go on from there: in a step without a row nothing moves.
        module(x, mask=torch.zeros(2, 60, dtype=torch.bool))
        torch.testing.assert_close(module.codebooks[:count, 5], replaced)
        torch.testing.assert_close(module.counts[0, :, 5], DECAY * mean)
        # One step later they have moved to the mean of what they were and what they were given.
        codes = module(x).codes
        assert (module.codebooks[:count, 5] - replaced).abs().max() < 10

    @pytest.mark.parametrize("update", ["ema", "gradient"])
    def test_they_wait_for_a_row(self, update):
        module = quantizer(update=update, dead_code_threshold=0.5)
        module(rows(2, 60, 8))
        before = module.tables.clone()
        module(rows(2, 60, 8)[:0])
        torch.testing.assert_close(module.tables, before)

    @pytest.mark.parametrize("size", [1, 50])
    def test_the_threshold_is_a_share_of_the_mean(self, size):
        module = quantizer(dead_code_threshold=0.5, decay=0.0)
        module.tables[0, 0] = 100 * torch.eye(16, 8) + 1000 * torch.eye(16, 8).roll(8, 0)
        before = module.codebooks[0].clone()
        # Of 48 rows a code has 3 on average: half of it is more than 1 and less than 2.
        module(before[torch.tensor([0] * 44 + [1, 2, 3, 3]).repeat(size)])
        same = (module.codebooks[0] == before).all(-1)
        assert same[0]
        assert same[3]
        counts = module.counts[0, 0]
        assert (counts[[0, 3]] == torch.tensor([44.0 * size, 2 * size])).all()
        assert (counts[[1, 2, *range(4, 16)]] == 3 * size).all()

    def test_of_more_dead_codes_than_rows_some_wait(self):
        module, x = quantizer(dead_code_threshold=0.9), rows(3, 8)
        before = module.tables[0].clone()
        codes = module(x).codes
        changed = (module.tables[0] != before).any(-1).sum(-1)
        used = torch.tensor([len(code.unique()) for code in codes.T])
        assert (changed <= used + 3).all()
        assert (changed >= 3).all()

    def test_off_by_default(self):
        module = quantizer()
        module.tables[0, :, 5] = 1000.0
        module(rows(2, 60, 8))
        assert (module.codebooks[:, 5] == 1000).all()

    def test_tables_that_learn_by_gradient(self):
        module = quantizer(update="gradient", dead_code_threshold=0.5)
        with torch.no_grad():
            module.tables[0, :, 5] = 1000.0
        x = rows(2, 60, 8).requires_grad_()
        module(x).commit_loss.sum().backward()
        assert (module.tables[0, :, 5].abs() < 10).all()
        assert (module.tables.grad[0, :, 5] == 0).all()
        assert module.counts.sum() > 0

    def test_more_codes_are_used_for_it(self):
        data = rows(40, 8, seed=7).repeat(5, 1) + 0.1 * rows(200, 8)
        perplexity = []
        for threshold in (0.0, 0.1):
            module = quantizer(dead_code_threshold=threshold)
            module.tables.add_(3)  # far from the rows: without replacement few codes are found
            for _ in range(60):
                module(data)
            perplexity.append(module.metrics()["perplexity"][0])
        assert perplexity[1] > 2 * perplexity[0]


class TestBeginning:
    def test_it_is_k_means_stage_by_stage(self):
        module, x = quantizer(kmeans_init=True, kmeans_iterations=4, decay=0.5), rows(4, 60, 8)
        mask = torch.arange(60) < 50
        module.initialize_(x, mask.expand(4, 60))
        left, counted = x[:, :50].reshape(-1, 8), 200
        for stage in range(3):
            table = module.codebooks[stage]
            # Centres are a fixed point of nothing, but means of rows: counts and sums say which.
            assert module.counts[0, stage].sum() == counted
            torch.testing.assert_close(
                module.sums[0, stage] / module.counts[0, stage, :, None], table
            )
            nearest = torch.cdist(left, table).argmin(-1)
            before = left.square().mean()
            left = left - table[nearest]
            assert left.square().mean() < 0.75 * before
        assert module.begun

    def test_the_first_stage_is_that_of_the_function(self):
        x = rows(300, 8)
        module = quantizer(kmeans_init=True)
        module.initialize_(x)
        errors = [
            torch.cdist(x, table).amin(-1).square().mean()
            for table in (module.codebooks[0], kmeans(x, 16, seed=1), rows(16, 8))
        ]
        assert abs(errors[0] / errors[1] - 1) < 0.1
        assert errors[0] < 0.8 * errors[2]

    def test_it_happens_once_with_the_first_rows_that_count(self):
        module, x = quantizer(kmeans_init=True, decay=0.0), rows(2, 60, 8)
        module(x, mask=torch.zeros(2, 60, dtype=torch.bool))
        assert not module.begun
        found = module(x)
        assert module.begun
        assert found.commit_loss[2] < found.commit_loss[0] < 0.5 * x.square().mean()
        before = module.tables.clone()
        module.decay = 1.0
        module(100 * x)
        torch.testing.assert_close(module.tables, before)

    @pytest.mark.parametrize("options", [{"update": "gradient"}, {"codebook_dim": 4}])
    def test_other_kinds(self, options):
        module, x = quantizer(kmeans_init=True, **options), rows(2, 60, 8).requires_grad_()
        found = module(x)
        found.commit_loss.sum().backward()
        assert module.begun
        assert (module.counts[0, 0] > 0).all()
        assert x.grad.abs().sum() > 0

    def test_fewer_rows_than_codes(self):
        module, x = quantizer(kmeans_init=True), rows(5, 8)
        out = module(x).out
        torch.testing.assert_close(out, x, atol=1e-5, rtol=1e-5)

    def test_groups(self):
        module, x = GroupedResidualVQ(8, 16, 3, groups=2, dead_code_threshold=0.1), rows(2, 60, 8)
        losses = [module(x).commit_loss for _ in range(3)]
        assert module.begun
        assert (losses[-1] <= losses[0] * 1.05).all()
        assert losses[0].shape == (2, 3)
        found = module.metrics()
        assert {name: value.shape for name, value in found.items()} == dict.fromkeys(found, (2, 3))


class TestDropout:
    def test_depths(self):
        module, x = quantizer(quantizer_dropout=0.5), rows(2000, 1, 8)
        depth = (module(x).codes >= 0).sum((1, 2))
        share = torch.stack([(depth == n).float().mean() for n in (1, 2, 3)])
        torch.testing.assert_close(share, torch.tensor([1, 1, 4]) / 6, atol=0.04, rtol=0)
        again = (module(x).codes >= 0).sum((1, 2))
        assert not torch.equal(again, depth)

    def test_items_not_rows(self):
        module, x = quantizer(quantizer_dropout=1.0), rows(30, 5, 8)
        depth = (module(x).codes >= 0).sum(-1)
        assert (depth == depth[:, :1]).all()
        assert len(depth.unique()) == 3

    def test_a_given_depth_takes_its_place(self):
        module, x = quantizer(quantizer_dropout=1.0), rows(30, 5, 8)
        assert (module(x, num_quantizers=3).codes >= 0).all()
        assert (module.eval()(x).codes >= 0).all()

    def test_what_is_drawn_depends_on_seed_and_step(self):
        def codes(seed, steps):
            state = torch.get_rng_state()
            module = quantizer(quantizer_dropout=1.0, seed=seed, dead_code_threshold=0.3)
            for _ in range(steps):
                found = module(rows(30, 5, 8)).codes
            assert (torch.get_rng_state() == state).all()
            return found >= 0

        assert torch.equal(codes(0, 2), codes(0, 2))
        assert not torch.equal(codes(0, 2), codes(0, 1))
        assert not torch.equal(codes(0, 2), codes(1, 2))


def test_metrics_by_hand():
    module, x = quantizer(decay=0.0), rows(2, 200, 8)
    tables = module.codebooks.clone()
    codes = module(x).codes
    found = module.metrics()
    for stage, code, left in residuals(x, codes, tables):
        share = code.bincount(minlength=16) / 400
        entropy = -(share[share > 0] * share[share > 0].log()).sum()
        torch.testing.assert_close(found["entropy"][stage], entropy)
        torch.testing.assert_close(found["perplexity"][stage], entropy.exp())
        torch.testing.assert_close(found["dead"][stage], (share < 0.1 / 16).float().mean())
        after = left - tables[stage][code]
        snr = 10 * torch.log10(x.square().sum() / after.square().sum())
        torch.testing.assert_close(found["snr_db"][stage], snr, atol=1e-4, rtol=1e-4)
    per_stage = ResidualVQ(
        8, 16, 3, codebook_dim=2, projection="per_stage", update="gradient", metric="cosine"
    )
    per_stage(x)
    assert "snr_db" not in per_stage.metrics()


@pytest.mark.parametrize(
    "options",
    [
        {"kmeans_init": True, "dead_code_threshold": 0.2},
        {"kmeans_init": True, "dead_code_threshold": 0.2, "quantizer_dropout": 0.5},
        {"update": "gradient", "kmeans_init": True, "commitment_weight": 0.25},
        {"codebook_dim": 4, "metric": "cosine"},
        {"shared_codebook": True, "dead_code_threshold": 0.2},
        {
            "codebook_dim": 4,
            "projection": "per_stage",
            "update": "gradient",
            "metric": "cosine",
            "quantizer_dropout": 0.5,
        },
        {"groups": 2, "kmeans_init": True},
    ],
    ids=["ema", "dropout", "gradient", "projected", "shared", "per_stage", "groups"],
)
def test_compiled_from_the_first_step(options):
    """Ten steps of one graph, with the results of eager ones; then evaluation."""
    if "groups" in options:
        modules = [GroupedResidualVQ(8, 16, 3, **options) for _ in range(2)]
    else:
        modules = [quantizer(**options) for _ in range(2)]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(modules[1], fullgraph=True, backend=counter)
    optimizers = [
        torch.optim.SGD([torch.zeros(1, requires_grad=True), *m.parameters()], lr=0.1)
        for m in modules
    ]
    for step in range(10):
        results = []
        for call, optimizer in zip((modules[0], compiled), optimizers, strict=True):
            x = rows(4, 30, 8, seed=step).requires_grad_()
            mask = torch.arange(30) < 25
            out, codes, loss = call(x, mask.expand(4, 30))
            optimizer.zero_grad()
            (out.square().mean() + loss.sum()).backward()
            optimizer.step()
            results.append((out, codes, loss, x.grad))
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-4)
        assert counter.frame_count == 1
    for name, value in modules[0].state_dict().items():
        torch.testing.assert_close(modules[1].state_dict()[name], value, atol=1e-5, rtol=1e-4)
    assert modules[1].progress.tolist() == [1, 10]
    with torch.no_grad():
        x = rows(1, 3, 8)
        wanted = modules[0].eval()(x)
        found = torch.compile(modules[1].eval(), fullgraph=True, backend="aot_eager")(x)
        for eager, ours in zip(wanted, found, strict=True):
            torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)


def test_compiled_by_inductor():
    """Whose backward pass must not see the tables as the step has left them."""
    modules = [quantizer(kmeans_init=True, dead_code_threshold=0.2) for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(modules[1], fullgraph=True)
    for step in range(3):
        slopes = []
        for call in (modules[0], compiled):
            x = rows(4, 30, 8, seed=step).requires_grad_()
            call(x).commit_loss.sum().backward()
            slopes.append(x.grad)
        torch.testing.assert_close(*slopes)


def test_two_compiled_steps_before_the_gradient():
    module, x = quantizer(update="gradient", kmeans_init=True), rows(2, 50, 8)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True)
    (compiled(x).commit_loss + compiled(x).commit_loss).sum().backward()
    twice = module.tables.grad.clone()
    module.tables.grad = None
    module(x).commit_loss.sum().backward()
    torch.testing.assert_close(twice, 2 * module.tables.grad)


def test_progress_is_part_of_the_state():
    module = quantizer(kmeans_init=True)
    module(rows(2, 30, 8))
    assert module.state_dict()["_extra_state"].tolist() == [1, 1]
    assert copy.deepcopy(module).progress.tolist() == [1, 1]
    fresh = quantizer(kmeans_init=True)
    assert fresh.progress[BEGUN] == 0
    fresh.load_state_dict(module.state_dict())
    assert fresh.begun
