"""SinKD: a gradient where distributions do not overlap, no harm to a classifier of digits, and the
speed of the op against the loop of divisions that it replaces.

Of no overlap: 32 rows of 10 classes, teacher logits N(0, 1) + 6 on the true class, student logits
N(0, 1) + a bias on class 0. Of digits: a linear student of 8 x 8 images after a small network,
3 epochs in batches of 32, with KL and with KL and the Sinkhorn term from the same start.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stillhouse import data, ops
from stillhouse.methods.language import sinkhorn_kd
from stillhouse.report import Report

ROWS, CLASSES = 32, 10
BIASES = (8.0, 12.0)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward KL": lambda z, t: ops.divergence_loss(z, t, "forward_kl", reduction="sum"),
    "reverse KL": lambda z, t: ops.divergence_loss(z, t, "reverse_kl", reduction="sum"),
    "JSD": lambda z, t: ops.divergence_loss(z, t, "jsd", reduction="sum"),
    "SinKD": lambda z, t: sinkhorn_kd(z, t),
}
EPOCHS, BATCH, TEST = 3, 32, 500
WEIGHT = 0.8 * 0.001  # of the code, for a plan of mass 32


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    gradients, accuracy = [], []
    images, classes = map(torch.from_numpy, data.digits())
    for seed in report.within(budget, seeds):
        for bias in BIASES:
            gradients.append({"bias": bias, "seed": seed, **_without_overlap(bias, seed)})
        accuracy.append({"seed": seed, **_on_digits(images, classes, seed)})
    report.table("mean gradient norm where the true class is not the student's", gradients)
    report.table("accuracy on digits", accuracy)
    for bias in BIASES:
        of = {name: [g[name] for g in gradients if g["bias"] == bias] for name in LOSSES}
        report.claim(
            f"reverse KL's gradient at bias {bias:g}, against SinKD's",
            of["reverse KL"],
            of["SinKD"],
            relation="<=",
        )
        report.claim(
            f"JSD's gradient at bias {bias:g}, against reverse KL's",
            of["JSD"],
            of["reverse KL"],
            relation="<=",
        )
    report.claim(
        "share of such rows that SinKD moves towards the true class",
        [min(g["towards"] for g in gradients if g["seed"] == s) for s in report.seeds],
        1.0,
    )
    gains = torch.tensor([row["KL and SinKD"] - row["KL"] for row in accuracy])
    # Of one seed there is no spread.
    spread = gains.std().item() / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    report.table(
        "what the Sinkhorn term adds to the accuracy",
        [{"mean": gains.mean().item(), "+-": 1.96 * spread, "seeds": len(gains)}],
    )
    report.claim(
        "mean accuracy with the Sinkhorn term, less that of KL", gains.mean().item(), -0.003
    )
    report.claim("times as fast as a loop of divisions, forward", _speed(), 5.0)


def _without_overlap(bias: float, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(CLASSES, (ROWS,), generator=generator)
    teacher = torch.randn(ROWS, CLASSES, generator=generator)
    teacher[torch.arange(ROWS), classes] += 6
    student = torch.randn(ROWS, CLASSES, generator=generator)
    student[:, 0] += bias
    wrong, found = classes != 0, {}
    for name, loss in LOSSES.items():
        given = student.clone().requires_grad_()
        loss(given, teacher).backward()
        found[name] = given.grad[wrong].norm(dim=-1).mean().item()
    slopes = given.grad[torch.arange(ROWS), classes][wrong]
    return found | {"towards": (slopes < 0).float().mean().item()}


def _on_digits(images: Tensor, classes: Tensor, seed: int) -> dict[str, float]:
    """Accuracy of two students on 500 images, from one start on the same batches."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[:-TEST], order[-TEST:]
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    _train(teacher, images[train], classes[train], 30, seed, lambda z, rows: 0.0)
    start = {name: each.clone() for name, each in nn.Linear(64, CLASSES).state_dict().items()}
    with torch.no_grad():
        targets = teacher(images[train])
    result = {"teacher": _accuracy(teacher, images[test], classes[test])}

    def kl(z: Tensor, rows: Tensor) -> Tensor:
        return ops.divergence_loss(z, targets[rows], "soft_cross_entropy", temperature=2.0)

    def both(z: Tensor, rows: Tensor) -> Tensor:
        if len(rows) < 2:
            return kl(z, rows)
        return kl(z, rows) + WEIGHT * sinkhorn_kd(z, targets[rows])

    for name, loss in (("KL", kl), ("KL and SinKD", both)):
        student = nn.Linear(64, CLASSES)
        student.load_state_dict(start)
        _train(student, images[train], classes[train], EPOCHS, seed, loss)
        result[name] = _accuracy(student, images[test], classes[test])
    return result


def _train(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    epochs: int,
    seed: int,
    distillation: Callable[[Tensor, Tensor], Tensor | float],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            logits = model(images[rows])
            loss = 0.1 * cross_entropy(logits, classes[rows]) + 0.9 * distillation(logits, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    return (model(images).argmax(-1) == classes).float().mean().item()


@torch.no_grad()
def _speed() -> float:
    """Median seconds of twenty divisions by row and column sums, over those of the op."""
    cost = 2 * torch.rand(256, 32, 32)

    def loop() -> Tensor:
        plan = torch.exp(-cost / 0.1)
        for _ in range(20):
            plan = plan / plan.sum(2, keepdim=True)
            plan = plan / plan.sum(1, keepdim=True)
        return (plan * cost).sum((1, 2))

    def ours() -> Tensor:
        return ops.sinkhorn(cost, 0.1, return_plan=False).value

    times: dict[Callable[[], Tensor], list[float]] = {loop: [], ours: []}
    for _ in range(12):
        for call, seconds in times.items():
            since = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - since)
    medians = [sorted(seconds)[len(seconds) // 2] for seconds in times.values()]
    return medians[0] / medians[1]
