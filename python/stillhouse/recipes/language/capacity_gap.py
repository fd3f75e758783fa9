"""The law of capacity gap on digits: is the best teacher a larger one, but not the largest, and
does its size grow with the student's?

Teachers: networks of 8 x 8 images with 6 to 192 hidden units, 60 steps on 400 images. Students:
the 6 to 24 units of a teacher that its loss depends on most, distilled for 60 steps with the law's
loss. Sizes are hidden units, the metric is the cross-entropy on the other 1,397 images; each seed
stands for three splits. A control begins from random students.

The line belongs to these steps: of teachers trained for 100 the best one for 24 units has 24, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stillhouse import data
from stillhouse.methods.language import (
    CapacityGapLoss,
    capacity_gap_sweep,
    fit_capacity_gap_law,
    optimal_teacher,
)
from stillhouse.nn.surgery import slice_linear
from stillhouse.report import Report
from stillhouse.train import LogitRows, RowIndex

TEACHERS = (6, 8, 10, 12, 16, 20, 24, 30, 40, 48, 64, 96, 128, 192)
STUDENTS = (6, 8, 12, 16, 24)
CONTROL = (8, 16)
SPLITS, TRAIN = 3, 400
TEACHER_STEPS, TEACHER_RATE = 60, 1e-2
STEPS, RATE = 60, 5e-3

_Curve = tuple[list[float], Tensor]  # teacher sizes [k], losses [splits, k]


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    images, classes = map(torch.from_numpy, data.digits())
    rows, controls = [], []
    for seed in report.within(budget, seeds):
        for split in range(SPLITS * seed, SPLITS * (seed + 1)):
            study = _Split(images, classes, split)
            teachers = {size: study.teacher(size) for size in TEACHERS}
            for found, sizes, cut in ((rows, STUDENTS, True), (controls, CONTROL, False)):
                found += capacity_gap_sweep(
                    teachers,
                    sizes,
                    lambda teacher, size, _, study=study, cut=cut: study.distil(teacher, size, cut),
                    study.loss,
                    seeds=[split],
                )

    curves = {size: _curves(rows, size) for size in STUDENTS}
    optima = {size: optimal_teacher(*curves[size]) for size in STUDENTS}
    gaps = {size: (y.mean(0)[-1] - y.mean(0).min()).item() for size, (_, y) in curves.items()}
    best = [optimum.teacher for optimum in optima.values()]
    _show(report, curves, controls)
    report.table(
        "best teachers",
        [
            {
                "student": size,
                "best teacher": optimum.teacher,
                "from": optimum.ci[0],
                "to": optimum.ci[1],
                "censored": optimum.censored or "",
                "largest teacher, nats worse": gaps[size],
            }
            for size, optimum in optima.items()
        ],
    )
    _line(report, best)
    report.claim(
        "the largest teacher is worse than the best one, nats, least of all students",
        min(gaps.values()),
        0.05,
    )
    report.claim(
        "the best teacher is larger than the student: their ratio, least of all students",
        min(teacher / size for size, teacher in zip(STUDENTS, best, strict=True)),
        1.0,
        holds=all(teacher > size for size, teacher in zip(STUDENTS, best, strict=True)),
    )
    report.claim(
        "rank correlation of students and their best teachers", _spearman(STUDENTS, best), 0.9
    )


def _show(report: Report, curves: dict[int, _Curve], controls: list[dict[str, float]]) -> None:
    """Each student's loss over teachers; some beside students that begin from random weights."""
    rows = []
    for size, (sizes, metric) in curves.items():
        series = {"cut out of its teacher": metric.mean(0)}
        if size in CONTROL:
            series["random"] = _curves(controls, size)[1].mean(0)
            ranges = {name: (y.max() - y.min()).item() for name, y in series.items()}
            rows.append({"student": size, **ranges})
        report.curve(
            f"student-{size}",
            sizes,
            {name: y.tolist() for name, y in series.items()},
            xlabel="hidden units of the teacher",
            ylabel="cross-entropy of the student, nats",
        )
    report.table("what the choice of the teacher changes, nats", rows)


def _line(report: Report, best: list[float]) -> None:
    # No teacher is smaller than its student, so that an optimum at the low end is one.
    law = fit_capacity_gap_law(STUDENTS, best, counted="hidden units")
    numbers = {"slope": law.slope, "intercept": law.intercept, "r2": law.r2}
    report.table("the line", [numbers])
    context = {"counted": law.counted, "steps of distillation": STEPS}
    report.value("law", numbers | context | {"teacher of 20 units": law.teacher_for(20)})
    report.curve(
        "line",
        STUDENTS,
        {
            "best teacher": best,
            "line": [law.slope * size + law.intercept for size in STUDENTS],
            "equal": STUDENTS,
        },
        xlabel="hidden units of the student",
        ylabel="hidden units of the teacher",
    )


class _Split:
    """400 images to learn from and the rest to measure with."""

    def __init__(self, images: Tensor, classes: Tensor, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=self.generator)
        self.train = images[order[:TRAIN]], classes[order[:TRAIN]]
        self.test = images[order[TRAIN:]], classes[order[TRAIN:]]
        rows = torch.arange(TRAIN)
        self.index = RowIndex(row=rows, target=self.train[1], sequence=rows)
        self.objective = CapacityGapLoss()

    def teacher(self, size: int) -> nn.Sequential:
        model = self._network(size)
        images, classes = self.train
        _fit(model, lambda: cross_entropy(model(images), classes), TEACHER_STEPS, TEACHER_RATE)
        return model.requires_grad_(False)

    def distil(self, teacher: nn.Sequential, size: int, cut: bool) -> nn.Sequential:
        student = self._cut(teacher, size) if cut else self._network(size)
        images, _ = self.train
        targets = LogitRows(teacher(images), self.index)

        def loss() -> Tensor:
            return self.objective(LogitRows(student(images), self.index), targets, {})["loss"]

        _fit(student, loss, STEPS, RATE)
        return student

    @torch.no_grad()
    def loss(self, model: nn.Sequential) -> float:
        return cross_entropy(model(self.test[0]), self.test[1]).item()

    def _cut(self, teacher: nn.Sequential, size: int) -> nn.Sequential:
        """The units with the largest |dL/dxi| of a mask xi of ones."""
        first, activation, last = teacher
        mask = torch.ones(first.out_features, requires_grad=True)
        value = cross_entropy(last(activation(first(self.train[0])) * mask), self.train[1])
        kept = torch.autograd.grad(value, mask)[0].abs().argsort(descending=True)[:size]
        student = nn.Sequential(
            slice_linear(first, rows=kept), nn.ReLU(), slice_linear(last, columns=kept)
        )
        return student.requires_grad_(True)

    def _network(self, size: int) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(64, size), nn.ReLU(), nn.Linear(size, 10))
        with torch.no_grad():
            for layer in (model[0], model[2]):
                bound = layer.in_features**-0.5
                for parameter in layer.parameters():
                    parameter.uniform_(-bound, bound, generator=self.generator)
        return model


def _fit(model: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, foreach=True)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def _curves(rows: list[dict[str, float]], size: int) -> _Curve:
    """Teacher sizes [k] of a student size, and its losses [splits, k]."""
    own = [row for row in rows if row["student"] == size]
    sizes = sorted({row["teacher"] for row in own})
    splits = sorted({row["seed"] for row in own})
    loss = {(row["seed"], row["teacher"]): row["loss"] for row in own}
    metric = [[loss[split, teacher] for teacher in sizes] for split in splits]
    return sizes, torch.tensor(metric, dtype=torch.float64)


def _spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation of ranks; students are all of different sizes, equal teachers share a rank."""
    ranks = []
    for values in (x, y):
        each = torch.tensor(values, dtype=torch.float64)
        below = (each[:, None] > each).sum(1)
        ranks.append(below + ((each[:, None] == each).sum(1) - 1) / 2)
    return torch.corrcoef(torch.stack(ranks).double())[0, 1].item()
