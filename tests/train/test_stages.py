"""Training in stages: what learns, what is repeated, and a run that was cut off."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from stillhouse.nn.surgery import replace_modules_
from stillhouse.progress import Progress
from stillhouse.train import Stage, run_stages


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def batch(step, seed=0):
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(100 * seed + step))


def loss(network, x):
    value = (network(x)[:, 0] - x.sum(-1)).square().mean()
    return {"loss": value, "twice": 2 * value}


class Projected(nn.Module):
    """A loss with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, network, x):
        return (self.scale * network(x)[:, 0] - x.sum(-1)).square().mean()


class Cut(Exception):
    pass


def stages(projected, cut=None):
    """Two stages, the second with another module; `cut` raises before that step of it."""

    def data(step):
        if cut == step:
            raise Cut
        return batch(step, seed=1)

    def prepare(network):
        def make(path, module):
            torch.manual_seed(5)
            return nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))

        replace_modules_(network, "2", make)

    return [
        Stage("head", loss, 4, parameters="2.*", data=[batch(0), batch(1), batch(2)], lr=1e-2),
        Stage("all", projected, 5, data=data, lr=1e-2, prepare=prepare),
    ]


def test_each_stage_trains_what_it_says():
    network = model()
    before = copy.deepcopy(network)
    history = run_stages(network, [Stage("head", loss, 3, parameters="2.*", data=batch)])
    assert torch.equal(network[0].weight, before[0].weight)
    assert not torch.equal(network[2].weight, before[2].weight)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert [row["step"] for row in history] == [1, 2, 3]
    assert history[0]["twice"] == pytest.approx(2 * history[0]["loss"])
    assert history[0]["loss"] == pytest.approx(float(loss(before, batch(0))["loss"].detach()))


def test_it_is_the_loop_by_hand():
    network, other = model(), model()
    run_stages(network, [Stage("all", loss, 4, data=[batch(0), batch(1), batch(2)], lr=0.05)])
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.05)
    for step in (0, 1, 2, 0):
        optimizer.zero_grad()
        loss(other, batch(step))["loss"].backward()
        optimizer.step()
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_flags_and_modes_come_back():
    network = model().eval()
    network[0].bias.requires_grad_(False)
    seen = []

    def looking(network, x):
        seen.append(network.training)
        return loss(network, x)

    run_stages(network, [Stage("all", looking, 1, data=batch)])
    assert seen == [True]
    assert not network.training
    assert not network[0].bias.requires_grad
    with pytest.raises(ValueError, match="no parameter of Sequential matches 'x'"):
        run_stages(network, [Stage("all", loss, 1, parameters="x", data=batch)])
    assert not network[0].bias.requires_grad


@pytest.mark.parametrize(("cut", "save_every"), [(0, None), (3, 2), (4, 4), (3, None)])
def test_a_run_that_goes_on_is_the_run(tmp_path, cut, save_every):
    whole, projection = model(), Projected()
    want = run_stages(whole, stages(projection))
    assert float(projection.scale.detach()) != 1  # it has learned
    file = tmp_path / "stages.pt"
    options = dict(resume=file, save_every=save_every)
    with pytest.raises(Cut):
        run_stages(model(), stages(Projected(), cut), **options)
    resumed, again = model(), Projected()
    asked = []
    plan = stages(again)
    inner = plan[1].data
    plan[1] = replace(plan[1], data=lambda step: asked.append(step) or inner(step))
    found = run_stages(resumed, plan, **options)
    first = cut // save_every * save_every if save_every else 0
    assert asked == list(range(first, 5))
    assert found == want
    assert torch.equal(again.scale, projection.scale)
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    # A third call has nothing left to do.
    finished = model()
    assert run_stages(finished, stages(Projected(), cut=0), **options) == want
    assert torch.equal(finished[2][0].weight, whole[2][0].weight)
    assert [path.name for path in tmp_path.iterdir()] == ["stages.pt"]


def test_batches_are_skipped(tmp_path):
    batches = [batch(i) for i in range(3)]

    class Cutting(list):
        def __iter__(self):
            for number, each in enumerate(super().__iter__()):
                if number == 2 and self.cut:
                    raise Cut
                yield each

    data = Cutting(batches)
    data.cut = True
    options = dict(resume=tmp_path / "file", save_every=1)
    with pytest.raises(Cut):
        run_stages(model(), [Stage("all", loss, 5, data=data)], **options)
    data.cut = False
    resumed, whole = model(), model()
    assert run_stages(resumed, [Stage("all", loss, 5, data=data)], **options) == run_stages(
        whole, [Stage("all", loss, 5, data=batches)]
    )
    assert torch.equal(resumed[0].weight, whole[0].weight)


def test_progress_counts_the_steps_of_this_process(tmp_path, monkeypatch):
    def data(step):
        if step == 4:
            raise Cut
        return batch(step)

    options = dict(resume=tmp_path / "file", save_every=3)
    with pytest.raises(Cut):
        run_stages(model(), [Stage("all", loss, 5, data=data)], **options)
    begun = []

    def progress(unit, done):
        begun.append(done)
        return Progress(unit, done)

    monkeypatch.setattr("stillhouse.train.stages.Progress", progress)
    run_stages(model(), [Stage("all", loss, 5, data=batch)], **options)
    assert begun == [3]


def test_an_optimizer_of_ones_own_and_no_data():
    network = model()
    before = network[0].weight.detach().clone()

    def norm(network, nothing):
        assert nothing is None
        return network[0].weight.square().sum() / 2

    run_stages(network, [Stage("decay", norm, 1, lr=0.25, optimizer=torch.optim.SGD)])
    torch.testing.assert_close(network[0].weight, 0.75 * before)


def test_bad_stages(tmp_path):
    network = model()

    def stage(**changes):
        return Stage(**(dict(name="a", loss=loss, steps=1, data=batch) | changes))

    for given, message in (
        ([], "no stage was given"),
        ([stage(), stage()], "stages need names of their own, got a, a"),
        ([stage(steps=0)], "stage a has 0 steps"),
        ([stage(data=[])], "the data of stage a ended after 0 batches"),
        ([stage(data=iter([batch(0)]), steps=2)], "ended after 1 batches for good"),
        ([stage(loss=lambda network, x: network(x).sum() * float("nan"))], "is nan at step 1"),
    ):
        with pytest.raises(ValueError, match=message):
            run_stages(network, given)
    with pytest.raises(ValueError, match="save_every must be at least 1, got 0"):
        run_stages(network, [stage()], save_every=0)
    file = tmp_path / "file"
    run_stages(network, [stage()], resume=file)
    with pytest.raises(ValueError, match=r"is of the stages \[\['a', 1\]\], this run has"):
        run_stages(network, [stage(steps=2)], resume=file)
