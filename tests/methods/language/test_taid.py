"""TAID against closed forms: its loss, its gradient, its schedule."""

import json
import math

import pytest
import torch

from stillhouse.methods.language import TAIDLoss, taid_loss
from stillhouse.recipes.language import taid as recipe
from stillhouse.report import Report
from stillhouse.train import LogitRows, RowIndex

STUDENT = torch.tensor([0.25, 0.50, 0.25], dtype=torch.float64).log()
TEACHER = torch.tensor([0.50, 0.25, 0.25], dtype=torch.float64).log()
MIXED = torch.tensor([0.5**0.4 * 0.25**0.6, 0.25**0.4 * 0.5**0.6, 0.25], dtype=torch.float64)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 2, 5, 17, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def rows(student, teacher):
    position = torch.arange(len(student))
    index = RowIndex(row=position, target=torch.zeros_like(position), sequence=position)
    return LogitRows(student, index), LogitRows(teacher, index)


def gradient(loss, student):
    return torch.autograd.grad(loss, student)[0]


# The loss -----------------------------------------------------------------------------------------


def test_at_t_one_it_is_soft_cross_entropy(logits):
    student, teacher = logits
    loss = taid_loss(student, teacher, t=1.0)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(loss, -(p * q.log()).sum(-1).mean())
    torch.testing.assert_close(gradient(loss, student), (q - p) / 10)


def test_at_t_zero_nothing_pulls(logits):
    student, teacher = logits
    # q - p_t with p_t = q: one rounding of a probability is all that may be left.
    assert gradient(taid_loss(student, teacher, t=0.0), student).abs().max() < 1e-17


def test_three_classes_by_hand():
    loss = taid_loss(STUDENT[None], TEACHER[None], t=0.4)
    assert loss.item() == pytest.approx(1.112356, abs=1e-6)
    torch.testing.assert_close(loss, -(MIXED / MIXED.sum() * STUDENT).sum())


def test_gradient_is_that_of_the_renyi_divergence_of_order_t(logits):
    student, teacher = logits
    t = 0.3
    overlap = t * teacher.log_softmax(-1) + (1 - t) * student.log_softmax(-1)
    renyi = overlap.logsumexp(-1) / (t - 1)
    expected = gradient(renyi.mean(), student)
    torch.testing.assert_close(
        gradient(taid_loss(student, teacher, t), student), expected, atol=1e-7, rtol=0
    )


def test_no_gradient_flows_into_the_target(logits):
    student, teacher = logits
    target = torch.softmax(0.6 * student.detach() + 0.4 * teacher, -1)
    detached = -(target * student.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(
        gradient(taid_loss(student, teacher, 0.4), student), gradient(detached, student)
    )


def test_temperature_divides_both_sides(logits):
    student, teacher = logits
    expected = taid_loss(student / 2.5, teacher / 2.5, 0.4)
    torch.testing.assert_close(taid_loss(student, teacher, 0.4, temperature=2.5), expected)


def test_masked_rows_do_not_count(logits):
    student, teacher = logits
    mask = torch.tensor([[True] * 3 + [False] * 2, [False] * 5])
    loss = taid_loss(student, teacher, 0.4, mask=mask)
    torch.testing.assert_close(loss, taid_loss(student[0, :3], teacher[0, :3], 0.4))
    assert gradient(loss, student)[~mask].abs().max() == 0
    nothing = taid_loss(student, teacher, 0.4, mask=torch.zeros_like(mask))
    assert nothing == 0
    assert gradient(nothing, student).abs().max() == 0


def test_t_as_a_tensor_is_t_as_a_number(logits):
    assert taid_loss(*logits, torch.tensor(0.4, dtype=torch.float64)) == taid_loss(*logits, 0.4)


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
def test_t_outside_the_unit_interval_raises(logits, t):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        taid_loss(*logits, t)


def test_vocabulary_mismatch_raises(logits):
    student, teacher = logits
    with pytest.raises(ValueError, match="17"):
        taid_loss(student, teacher[..., :16], 0.4)


# The schedule -------------------------------------------------------------------------------------


def trace(objective, losses, total_steps):
    """t after each step."""
    out = []
    for step, loss in enumerate(losses, start=1):
        objective.update({"loss": loss}, step, total_steps)
        out.append(objective.t)
    return out


def linear(steps, t_start=0.4, t_end=1.0):
    """The linear schedule from the second step on; the first loss is only remembered."""
    return [t_start] + [t_start + (t_end - t_start) * n / steps for n in range(2, steps + 1)]


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"adaptive": False, "alpha": 1.0}])
def test_without_adaptation_t_is_linear(options):
    assert trace(TAIDLoss(**options), [2.0, 1.0, 3.0, 2.5], 4) == pytest.approx(linear(4))


def test_constant_loss_moves_t_by_half_of_alpha():
    objective = TAIDLoss(t_start=0.2, alpha=0.1)
    assert trace(objective, [2.0, 2.0], 10**6) == pytest.approx([0.2, 0.2 + 0.05 * 0.8])
    assert objective.delta_t == pytest.approx(0.05 * 0.8)


def test_halved_loss_without_momentum():
    objective = TAIDLoss(t_start=0.2, alpha=0.1, beta=0.0)
    trace(objective, [2.0, 1.0], 10**6)
    assert objective.momentum == pytest.approx(0.5)
    assert objective.delta_t == pytest.approx(0.1 * 0.622459 * 0.8, rel=1e-6)
    assert objective.t == pytest.approx(0.2 + objective.delta_t)


def test_momentum_averages_the_relative_improvement():
    objective = TAIDLoss(beta=0.75)
    trace(objective, [2.0, 1.0, 0.25], 10**6)
    assert objective.momentum == pytest.approx(0.75 * 0.25 * 0.5 + 0.25 * 0.75)


def test_t_never_decreases_and_ends_at_t_end():
    losses = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()
    ts = trace(TAIDLoss(t_end=0.9, alpha=0.5, beta=0.5), losses, 200)
    assert ts == sorted(ts)
    assert ts[-1] == 0.9
    assert all(t >= floor for t, floor in zip(ts, linear(200, t_end=0.9), strict=True))


def test_a_loss_that_jumps_up_from_almost_nothing_does_not_overflow():
    assert trace(TAIDLoss(beta=0.0), [1e-12, 10.0], 10**6)[-1] == pytest.approx(0.4, abs=1e-5)


def test_alpha_auto_is_eight_over_the_run():
    automatic, fixed = TAIDLoss(alpha="auto"), TAIDLoss(alpha=8 / 500)
    assert trace(automatic, [2.0, 1.9, 1.8], 500) == trace(fixed, [2.0, 1.9, 1.8], 500)
    # Never more than 1: t goes half of what is left, sigmoid(0) = 1/2, where the loss stands still.
    short = TAIDLoss(alpha="auto")
    trace(short, [2.0, 2.0], 2)
    assert short.delta_t == pytest.approx(0.5 * (1 - 0.4))


def test_paper_alpha_never_beats_the_linear_floor_in_a_short_run():
    losses = [2.0 * 0.999**n for n in range(1000)]
    assert trace(TAIDLoss(), losses, 1000) == pytest.approx(linear(1000))


def test_a_batch_without_supervised_rows_changes_nothing():
    objective = TAIDLoss()
    objective.update({"loss": 2.0}, 1, 10)
    before = objective.state_dict()
    objective.update({"loss": 0.0}, 2, 10)
    assert objective.state_dict() == before


def test_a_resumed_schedule_continues():
    losses = [3.0, 2.5, 2.6, 2.0, 1.9, 1.7]
    whole, first, second = (TAIDLoss(alpha=0.05, beta=0.9) for _ in range(3))
    undisturbed = trace(whole, losses, 6)
    trace(first, losses[:3], 6)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in (4, 5, 6):
        second.update({"loss": losses[step - 1]}, step, 6)
    assert second.t == undisturbed[-1]
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_start": 1.0}, "t_start < t_end"),
        ({"t_start": -0.1}, "0 <= t_start"),
        ({"t_start": 0.5, "t_end": 0.5}, "t_start < t_end"),
        ({"t_end": 1.1}, "t_end <= 1"),
        ({"alpha": 1.5}, "alpha in"),
        ({"alpha": -0.5}, "alpha in"),
        ({"alpha": "fast"}, "alpha in"),
        ({"beta": 1.0}, "beta in"),
        ({"beta": -0.1}, "beta in"),
        ({"label_weight": 1.5}, "label_weight"),
    ],
)
def test_bad_hyperparameters_raise(options, message):
    with pytest.raises(ValueError, match=message):
        TAIDLoss(**options)


@pytest.mark.parametrize(
    ("loss", "step", "total_steps", "message"),
    [
        (math.nan, 2, 10, "finite loss"),
        (math.inf, 2, 10, "finite loss"),
        (1.0, 11, 10, "step"),
        (1.0, -1, 10, "step"),
        (1.0, 0, 0, "total_steps"),
    ],
)
def test_bad_updates_raise_and_leave_t(loss, step, total_steps, message):
    objective = TAIDLoss(alpha=0.5)
    trace(objective, [2.0], 10)
    before = objective.state_dict()
    with pytest.raises(ValueError, match=message):
        objective.update({"loss": loss}, step, total_steps)
    assert objective.state_dict() == before


# The objective ------------------------------------------------------------------------------------


def test_objective_reports_loss_t_and_distance_to_the_target():
    parts = TAIDLoss()(*rows(STUDENT[None], TEACHER[None]), {})
    assert parts["loss"].item() == pytest.approx(1.112356, abs=1e-6)
    assert parts["kl_to_target"].item() == pytest.approx(0.027882, abs=1e-6)
    assert parts["t"].item() == pytest.approx(0.4)
    assert parts["delta_t"] == 0
    assert parts["acceptance"].item() == pytest.approx(0.75)


def test_objective_has_the_gradient_of_the_function(logits):
    student, teacher = (side.flatten(0, 1) for side in logits)
    objective = TAIDLoss(t_start=0.3, temperature=2.0)
    loss = objective(*rows(student * 1, teacher), {})["loss"]
    expected = gradient(taid_loss(student, teacher, 0.3, temperature=2.0), logits[0])
    torch.testing.assert_close(gradient(loss, logits[0]), expected)


def test_distance_to_the_target_follows_t(logits):
    student, teacher = (side.detach().flatten(0, 1) for side in logits)
    objective = TAIDLoss(t_start=0.1, adaptive=False, temperature=2.0)
    trace(objective, [2.0] * 4, 4)
    parts = objective(*rows(student, teacher), {})
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    assert parts["t"] == 1
    torch.testing.assert_close(parts["kl_to_target"], (p * (p / q).log()).sum(-1).mean())
    torch.testing.assert_close(parts["acceptance"], torch.minimum(p, q).sum(-1).mean())


def test_training_reports_what_evaluation_does(logits):
    student, teacher = (side.flatten(0, 1) for side in logits)
    training = TAIDLoss()(*rows(student * 1, teacher), {})
    evaluation = TAIDLoss()(*rows(student.detach(), teacher), {})
    for name, value in evaluation.items():
        torch.testing.assert_close(training[name].detach(), value)


def test_distance_to_the_target_is_read_off_evenly_spaced_rows():
    student, teacher = torch.randn(2, 100, 9, generator=torch.Generator().manual_seed(0))
    whole = TAIDLoss()(*rows(student.clone(), teacher), {})["kl_to_target"]
    spaced = TAIDLoss()(*rows(student[::7].clone(), teacher[::7]), {})["kl_to_target"]
    assert whole == spaced


def test_an_excluded_column_does_not_spoil_the_report():
    student, teacher = STUDENT.clone()[None], TEACHER.clone()[None]
    student[0, 2] = teacher[0, 2] = -math.inf
    for t_start, losses in ((0.0, []), (0.4, []), (0.4, [1.0, 1.0])):
        objective = TAIDLoss(t_start=t_start, adaptive=False)
        trace(objective, losses, 2)
        parts = objective(*rows(student.clone(), teacher), {})
        assert all(value.isfinite() for value in parts.values())


def test_padded_columns_are_left_out(logits):
    student, teacher = (side.detach().flatten(0, 1) for side in logits)
    whole = TAIDLoss()(*rows(student[:, :11].clone(), teacher[:, :11]), {})
    padded = TAIDLoss()(*rows(student.clone(), teacher[:, :16]), {"vocab_size": 11})
    for name, value in whole.items():
        torch.testing.assert_close(padded[name], value)


def test_no_rows_give_zero():
    student = torch.zeros(0, 5, requires_grad=True)
    parts = TAIDLoss()(*rows(student * 1, torch.zeros(0, 5)), {})
    parts["loss"].backward()
    assert parts["loss"] == parts["kl_to_target"] == 0


def test_without_a_teacher_it_says_so():
    student, _ = rows(STUDENT[None], TEACHER[None])
    with pytest.raises(ValueError, match="teacher"):
        TAIDLoss()(student, None, {})


def test_a_t_that_moves_does_not_recompile(logits):
    student, teacher = (side.detach().float() for side in logits)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(taid_loss, fullgraph=True, backend=backend)
    for t in (0.4, 0.5, 0.6):
        t = torch.tensor(t, dtype=torch.float64)
        torch.testing.assert_close(
            compiled(student, teacher, t), taid_loss(student, teacher, t), rtol=1e-6, atol=0
        )
    assert len(graphs) == 1


def test_label_loss_is_mixed_in():
    student, teacher = rows(STUDENT[None], TEACHER[None])
    parts = TAIDLoss(label_weight=0.25)(student, teacher, {})
    expected = 0.75 * 1.112356 + 0.25 * -math.log(0.25)
    assert parts["loss"].item() == pytest.approx(expected, abs=1e-6)


def test_two_micro_batches_with_a_shared_denominator_are_one_batch(logits):
    student, teacher = (side.detach().flatten(0, 1) for side in logits)
    whole = TAIDLoss()(*rows(student.clone(), teacher), {})["loss"]
    parts = [
        TAIDLoss()(*rows(student[part].clone(), teacher[part]), {"denominator": 10})["loss"]
        for part in (slice(0, 3), slice(3, 10))
    ]
    torch.testing.assert_close(sum(parts), whole)


# The recipe ---------------------------------------------------------------------------------------


def test_recipe_in_a_few_steps(tmp_path, monkeypatch):
    for name in ("TEACHER_STEPS", "TUNING_STEPS", "STEPS"):
        monkeypatch.setattr(recipe, name, 12)
    report = Report("taid", tmp_path)
    recipe.run(report, range(2), budget=math.inf)
    report.save()
    assert report.seeds == [0, 1]
    assert len(report.claims) == 4
    assert report.curves["t"]["series"]["TAID, linear"][1] == pytest.approx([0.4, 0.9])
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {"t", "loss", "kl_to_target", "plane"}
