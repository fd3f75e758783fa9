"""Loyalty by hand and against SciPy."""

import math

import pytest
import torch

from stillhouse.methods.language import (
    label_loyalty,
    probability_loyalty,
    regression_loyalty,
)

TEACHER = torch.tensor([[0.75, 0.2, 0.05]], dtype=torch.float64)
STUDENT = torch.tensor([[0.8, 0.1, 0.1]], dtype=torch.float64)


def test_three_classes_by_hand():
    js = 0.0131457  # nats
    assert probability_loyalty(STUDENT, TEACHER, math.e) == pytest.approx(0.885345, abs=1e-6)
    assert probability_loyalty(STUDENT, TEACHER, math.e) == pytest.approx(1 - js**0.5, abs=1e-6)
    assert probability_loyalty(STUDENT, TEACHER) == pytest.approx(0.862286, abs=1e-6)
    assert probability_loyalty(TEACHER, STUDENT) == probability_loyalty(STUDENT, TEACHER)


def test_the_ends_of_the_scale():
    assert probability_loyalty(STUDENT, STUDENT) == 1
    disjoint = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.5, 0.5]])
    assert probability_loyalty(*disjoint) == pytest.approx(0, abs=1e-12)
    assert probability_loyalty(*disjoint, base=math.e) == pytest.approx(0.167445, abs=1e-6)


@pytest.mark.parametrize("base", [2.0, math.e])
def test_it_is_scipys_distance(base):
    distance = pytest.importorskip("scipy.spatial.distance")
    p, q = torch.randn(2, 50, 7, dtype=torch.float64).softmax(-1)
    want = 1 - distance.jensenshannon(p.numpy(), q.numpy(), base=base, axis=1).mean()
    assert probability_loyalty(p, q, base) == pytest.approx(want, rel=1e-9)


def test_labels_by_hand():
    student = torch.tensor([[3.0, 1.0], [0.0, 1.0], [2.0, 5.0], [1.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [4.0, 1.0], [0.0, 9.0], [7.0, 0.0]])
    assert label_loyalty(student, teacher) == 0.75


def test_numbers_are_correlated():
    stats = pytest.importorskip("scipy.stats")
    a = torch.randn(40, dtype=torch.float64)
    b = a + torch.randn(40, dtype=torch.float64)
    assert regression_loyalty(2 * a + 1, a) == pytest.approx(1, abs=1e-12)
    assert regression_loyalty(-a, a) == pytest.approx(-1, abs=1e-12)
    want = stats.pearsonr(a.numpy(), b.numpy()).statistic
    assert regression_loyalty(a, b) == pytest.approx(want, rel=1e-9)
    found = regression_loyalty(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), "mae",
                               value_range=(0, 5))  # fmt: skip
    assert found == pytest.approx(1 - 1.5 / 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: label_loyalty(STUDENT, TEACHER[:, :2]), r"got \(1, 3\) and \(1, 2\)"),
        (lambda: probability_loyalty(STUDENT, TEACHER.repeat(2, 1)), r"both be \[N, C\]"),
        (lambda: label_loyalty(STUDENT[:0], TEACHER[:0]), "with N >= 1"),
        (lambda: probability_loyalty(STUDENT, TEACHER * 1.01), "rows of teacher must be prob"),
        (lambda: probability_loyalty(STUDENT - 0.2, TEACHER), "rows of student must be prob"),
        (lambda: probability_loyalty(STUDENT, TEACHER, 1.0), "base must be above 1"),
        (lambda: regression_loyalty(torch.ones(3), torch.arange(3.0)), "constant predictions"),
        (lambda: regression_loyalty(torch.arange(3.0), torch.ones(3)), "constant predictions"),
        (lambda: regression_loyalty(torch.ones(3), torch.ones(4)), r"both be \[N\]"),
        (lambda: regression_loyalty(*[torch.ones(3)] * 2, "mse"), "kind must be"),
        (lambda: regression_loyalty(*[torch.ones(3)] * 2, "mae"), "mae needs value_range"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert probability_loyalty(STUDENT, TEACHER * 1.0009) > 0.8  # rounding is no error
