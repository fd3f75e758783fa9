"""The law of capacity gap: importances against finite differences and by construction, the loss,
the sweep, and optima and lines with known answers."""

import json
import math

import pytest
import torch

from stillhouse.methods.language import (
    CapacityGapLoss,
    capacity_gap_sweep,
    component_sparsity,
    fit_capacity_gap_law,
    optimal_teacher,
)
from stillhouse.nn.surgery import Keep, slice_channels, take_layers
from stillhouse.recipes.language import capacity_gap as recipe
from stillhouse.report import Report
from stillhouse.train import LogitRows, supervised_rows


def test_component_sparsity():
    assert component_sparsity(0.6) == pytest.approx(0.367544, abs=1e-6)
    assert component_sparsity(0.9) == pytest.approx(0.683772, abs=1e-6)
    assert component_sparsity(0) == 0
    assert component_sparsity(0.6, rounded=True) == 0.37
    for p in (1, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"is in \[0, 1\)"):
            component_sparsity(p)


def test_the_shape_of_the_published_student():
    """32 blocks of 4096 without the 4 lowest and highest, three quarters of every width: on the
    meta device, nothing is computed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        teacher = LlamaForCausalLM(LlamaConfig())
    keep = Keep(hidden=range(3072), heads=range(24), ffn=range(8192))
    student = take_layers(slice_channels(teacher, keep), range(4, 28))
    config = student.config
    assert (config.num_hidden_layers, config.hidden_size) == (24, 3072)
    assert (config.num_attention_heads, config.head_dim, config.intermediate_size) == (
        24,
        128,
        8192,
    )
    count = sum(parameter.numel() for parameter in student.parameters())
    layer = 4 * 3072 * 3072 + 3 * 3072 * 8192 + 2 * 3072
    assert count == 24 * layer + 2 * 32000 * 3072 + 3072


# The loss -----------------------------------------------------------------------------------------


def test_the_loss_is_half_and_half():
    generator = torch.Generator().manual_seed(0)
    index = supervised_rows(torch.randint(0, 9, (2, 6), generator=generator))
    student, teacher = torch.randn(2, 10, 9, generator=generator, dtype=torch.float64)
    parts = CapacityGapLoss()(LogitRows(student.clone(), index), LogitRows(teacher, index), {})
    log_q, p = student.log_softmax(-1), teacher.softmax(-1)
    hard = -log_q.gather(1, index.target[:, None]).mean()
    soft = -(p * log_q).sum(-1).mean()
    torch.testing.assert_close(parts["loss"], 0.5 * hard + 0.5 * soft)
    # What the soft part is above KL is the teacher's entropy.
    kl = (p * (p.log() - log_q)).sum(-1).mean()
    entropy = -(p * p.log()).sum(-1).mean()
    only = CapacityGapLoss(label_weight=0.0)
    found = only(LogitRows(student.clone(), index), LogitRows(teacher, index), {})["loss"]
    torch.testing.assert_close(found - kl, entropy)
    with pytest.raises(ValueError, match="label_weight is a share"):
        CapacityGapLoss(label_weight=2.0)


# The sweep ----------------------------------------------------------------------------------------


def run_sweep(store=None, fail=None, calls=None):
    def distill(teacher, size, seed):
        if calls is not None:
            calls.append((teacher, size, seed))
        if (teacher, size, seed) == fail:
            raise KeyboardInterrupt
        return teacher, size, seed

    teachers = {size: f"t{size}" for size in (8, 2, 4, 16)}
    return capacity_gap_sweep(
        teachers,
        [2, 4],
        distill,
        lambda student: len(student[0]) + student[1] / 10 + student[2] / 100,
        seeds=[0, 1],
        store=store,
    )


def test_every_pair_and_seed():
    rows = run_sweep()
    pairs = [(2, 2), (2, 4), (2, 8), (2, 16), (4, 4), (4, 8), (4, 16)]
    assert [(row["student"], row["teacher"]) for row in rows] == pairs * 2
    assert rows[3] == {"student": 2, "teacher": 16, "seed": 0, "loss": 3.2}


def test_a_sweep_goes_on(tmp_path):
    store, calls = tmp_path / "rows.json", []
    with pytest.raises(KeyboardInterrupt):
        run_sweep(store, fail=("t4", 4, 0))
    assert len(json.loads(store.read_text())) == 4
    assert run_sweep(store, calls=calls) == run_sweep()
    assert calls[0] == ("t4", 4, 0)
    assert len(calls) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(("teachers", "sizes", "message"), [
    ([4, 8, 16], [4], "at least 2 student sizes"),
    ([4, 8], [2, 4], "student 2 needs at least 3 teachers of its size or more, got 2"),
    ([4, 8, 16], [4, 20], "student 20 needs at least 3 teachers of its size or more, got 0"),
])  # fmt: skip
def test_sweeps_that_cannot_be(teachers, sizes, message):
    with pytest.raises(ValueError, match=message):
        capacity_gap_sweep(
            dict.fromkeys(teachers), sizes, lambda *_: None, lambda _: 0.0, seeds=[0]
        )


def test_a_loss_that_is_not_finite():
    with pytest.raises(ValueError, match="the loss of student 2 of teacher 4, seed 7, is nan"):
        capacity_gap_sweep(
            dict.fromkeys([4, 8, 16]), [2, 4], lambda *_: None, lambda _: math.nan, seeds=[7]
        )


# Optimum and line ---------------------------------------------------------------------------------


def test_a_parabola_in_log_size_is_found():
    sizes = [5, 9, 20, 41, 77]
    metric = [3 + 0.7 * math.log(size / 17) ** 2 for size in sizes]
    optimum = optimal_teacher(sizes, metric)
    assert optimum.teacher == pytest.approx(17, rel=1e-9)
    assert optimum.ci == (9, 41)
    assert optimum.censored is None


def test_within_the_grid_step():
    sizes = [10, 15, 20, 25, 35, 45, 60]
    optimum = optimal_teacher(sizes, [(size - 30) ** 2 for size in sizes])
    assert 25 < optimum.teacher < 35


def test_optima_at_an_end():
    assert optimal_teacher([1, 2, 3], [1, 2, 3])[::2] == (1, "low")
    assert optimal_teacher([1, 2, 3], [3, 2, 1])[::2] == (3, "high")
    assert optimal_teacher([1, 2, 4], [1, 0, 0]).teacher > 2
    assert optimal_teacher([1, 2, 3], [5, 5, 5]).censored == "low"


def test_the_interval_is_of_seeds():
    """Seeds whose optima are 10 and 20, as many of each: their mean's may lie between."""
    sizes = [5.0, 8, 12, 18, 27, 40]
    curves = [[math.log(x / centre) ** 2 for x in sizes] for centre in (10, 20) * 4]
    optimum = optimal_teacher(sizes, curves)
    assert optimum.teacher == pytest.approx(math.sqrt(200), rel=1e-9)
    low, high = optimum.ci
    assert 10 <= low < optimum.teacher < high <= 20
    # Binomial(8, 1/2): 2.5 % are at most 1 of 8.
    assert low == pytest.approx(10 * 2 ** (1 / 8), rel=1e-6)
    assert optimal_teacher(sizes, curves) == optimum
    same = optimal_teacher(sizes, [curves[0]] * 3)
    assert same.ci == pytest.approx((10, 10))


@pytest.mark.parametrize(("sizes", "metric", "message"), [
    ([1, 2], [1, 2], "at least 3 ascending sizes"),
    ([1, 3, 2], [1, 2, 3], "ascending sizes"),
    ([0, 1, 2], [1, 2, 3], "ascending sizes above 0"),
    ([1, 2, 3], [1, 2], r"a metric \[3\] or \[seeds, 3\], got \(2,\)"),
    ([1, 2, 3], [1, math.nan, 2], "not finite"),
])  # fmt: skip
def test_optima_that_cannot_be(sizes, metric, message):
    with pytest.raises(ValueError, match=message):
        optimal_teacher(sizes, metric)


def test_an_exact_line():
    law = fit_capacity_gap_law([10, 20, 40], [2.5 * s - 11.5 for s in (10, 20, 40)])
    assert law.slope == pytest.approx(2.5)
    assert law.intercept == pytest.approx(-11.5)
    assert law.r2 == pytest.approx(1)
    assert law.teacher_for(30) == pytest.approx((63.5, 63.5, 63.5))
    assert law.student_for(63.5) == pytest.approx((30, 30, 30))
    assert law.covariance.abs().max() < 1e-20


def test_the_fit_is_numpys():
    import numpy as np

    s, t, w = [5, 9, 14, 30], [11.0, 25, 30, 80], [1.0, 2, 1, 0.5]
    line, covariance = np.polyfit(s, t, 1, w=np.sqrt(w), cov=True)
    law = fit_capacity_gap_law(s, t, weights=w)
    assert (law.slope, law.intercept) == pytest.approx(tuple(line))
    np.testing.assert_allclose(law.covariance.numpy(), covariance, rtol=1e-9)
    plain = fit_capacity_gap_law(s, t)
    assert plain.r2 == pytest.approx(np.corrcoef(s, t)[0, 1] ** 2)
    size, low, high = law.teacher_for(20)
    error = math.sqrt(np.array([20, 1]) @ covariance @ np.array([20, 1]))
    assert (size, high - low) == pytest.approx((line @ [20, 1], 4 * error))
    back, low, high = law.student_for(size)
    assert (back, high - low) == pytest.approx((20, 4 * error / line[0]))


def test_two_points_have_no_interval():
    law = fit_capacity_gap_law([1, 2], [3, 5])
    assert law.teacher_for(4)[0] == pytest.approx(9)
    assert math.isnan(law.teacher_for(4)[1])


def test_censored_points_are_left_out():
    law = fit_capacity_gap_law(
        [10, 20, 30, 40], [25, 50, 75, 50], censored=[None, None, None, "high"], counted="units"
    )
    assert law.slope == pytest.approx(2.5)
    assert law.counted == "units"


@pytest.mark.parametrize(("options", "message"), [
    (dict(censored=["high", "high"]), "every optimum is at the high end"),
    (dict(censored=["high", None]), "at least 2 points, got 1"),
    (dict(students=[], teachers=[]), "at least 2 points, got 0"),
    (dict(teachers=[1.0, math.inf]), "must be finite"),
    (dict(weights=[1.0, 0.0]), "weights positive"),
    (dict(counted=["all parameters", "units"]), "counted in one way, got all parameters, units"),
])  # fmt: skip
def test_lines_that_cannot_be(options, message):
    given = dict(students=[1.0, 2.0], teachers=[2.0, 4.0]) | options
    with pytest.raises(ValueError, match=message):
        fit_capacity_gap_law(**given)


def test_a_falling_line_has_no_inverse():
    with pytest.raises(ValueError, match="the line does not rise"):
        fit_capacity_gap_law([1, 2, 3], [3, 2, 1]).student_for(2)


# The recipe ---------------------------------------------------------------------------------------


def test_recipe_in_a_few_steps(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    for name, value in (
        ("TEACHERS", (4, 8, 12, 24)),
        ("STUDENTS", (4, 8)),
        ("CONTROL", (4, 8)),
        ("SPLITS", 1),
        ("TEACHER_STEPS", 5),
        ("STEPS", 4),
    ):
        monkeypatch.setattr(recipe, name, value)
    report = Report("capacity-gap", tmp_path)
    recipe.run(report, range(2), budget=math.inf)
    report.save()
    assert report.seeds == [0, 1]
    assert len(report.claims) == 3
    assert len(report.curves["student-4"]["series"]["cut out of its teacher"][1]) == 4
    assert set(report.curves["student-8"]["series"]) == {"cut out of its teacher", "random"}
    assert {path.stem for path in tmp_path.glob("*.png")} == {"student-4", "student-8", "line"}


def test_the_students_are_the_important_units():
    study = recipe._Split(torch.rand(500, 64), torch.arange(500) % 10, 0)
    teacher = study._network(8)
    with torch.no_grad():
        teacher[2].weight[:, [1, 5]] = 0  # what goes nowhere is the first to go
    student = study._cut(teacher, 6)
    rows = {tuple(row.tolist()) for row in student[0].weight.detach()}
    kept = [i for i in range(8) if tuple(teacher[0].weight[i].tolist()) in rows]
    assert kept == [0, 2, 3, 4, 6, 7]


def test_rank_correlation():
    from scipy.stats import spearmanr

    x, y = [6, 8, 12, 16, 24], [8.0, 11, 9, 11, 40]
    assert recipe._spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)


def test_it_trains_a_language_model(assert_learns):
    """`stillhouse distill --method capacity-gap`."""
    assert_learns("capacity-gap")
