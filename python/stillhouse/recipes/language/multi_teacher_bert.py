"""Two teachers on digits: is a student of both as right as one of the better, and to whom is each
student loyal?

Each teacher sees one half of an 8 x 8 image, left or right, so that they err on different ones.
Students see the whole image and no label: from the left teacher, from the right one, from both,
40 epochs from the same start. Accuracy and loyalty on 500 images that nobody was trained on.
And the time of a BERT of 12 blocks over that of the paper's 6 of them (random weights).
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stillhouse import data
from stillhouse.methods.language import ensemble_kl, label_loyalty, probability_loyalty
from stillhouse.nn.surgery import take_layers
from stillhouse.report import Report

CLASSES, TEST, EPOCHS, BATCH = 10, 500, 40, 64
HIDDEN = {"teacher": 64, "student": 32}
LAYERS = (0, 2, 4, 7, 9, 11)
LEFT, RIGHT, BOTH = "left", "right", "both"


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    images, classes = map(torch.from_numpy, data.digits())
    halves = {LEFT: _half(images, 0), RIGHT: _half(images, 4)}
    rows = []
    for seed in report.within(budget, seeds):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        train, test = order[:-TEST], order[-TEST:]
        teachers = {}
        for number, (name, half) in enumerate(halves.items()):
            model = _network(32, HIDDEN["teacher"], 10 * seed + number)

            def of_labels(z: Tensor, at: Tensor) -> Tensor:
                return cross_entropy(z, classes[at])

            _fit(model, half, train, of_labels, seed)
            with torch.no_grad():
                teachers[name] = model(half)
        row = {"seed": seed}
        for name, logits in teachers.items():
            row[f"{name} teacher"] = _accuracy(logits[test], classes[test])
        for name in (LEFT, RIGHT, BOTH):
            of = list(teachers) if name == BOTH else [name]

            def of_teachers(z: Tensor, at: Tensor, of=of, teachers=teachers) -> Tensor:
                return ensemble_kl(z, [teachers[each][at] for each in of])

            student = _network(64, HIDDEN["student"], 100 + seed)
            _fit(student, images, train, of_teachers, seed)
            with torch.no_grad():
                z = student(images[test])
            row[f"from {name}"] = _accuracy(z, classes[test])
            for other, logits in teachers.items():
                p, q = logits[test].softmax(-1), z.softmax(-1)
                row[f"{name} to {other}"] = probability_loyalty(q, p)
                row[f"{name} to {other}, labels"] = label_loyalty(q, p)
        rows.append(row)
    _tables(report, rows)
    _claims(report, rows)
    report.table("blocks", [_speed()])


def _tables(report: Report, rows: list[dict[str, float]]) -> None:
    accuracy = ["seed", "left teacher", "right teacher", "from left", "from right", "from both"]
    report.table("accuracy", [{name: row[name] for name in accuracy} for row in rows])
    loyal = [
        {
            "student": f"from {name}",
            "to": other,
            "probabilities": [row[f"{name} to {other}"] for row in rows],
            "labels": [row[f"{name} to {other}, labels"] for row in rows],
        }
        for name in (LEFT, RIGHT, BOTH)
        for other in (LEFT, RIGHT)
    ]
    report.table("loyalty", loyal)
    report.curve(
        "loyalty",
        {f"from {name}": [row[f"{name} to left"] for row in rows] for name in (LEFT, RIGHT, BOTH)},
        {f"from {name}": [row[f"{name} to right"] for row in rows] for name in (LEFT, RIGHT, BOTH)},
        xlabel="probability loyalty to the left teacher",
        ylabel="to the right teacher",
        points=True,
    )


def _claims(report: Report, rows: list[dict[str, float]]) -> None:
    both = [row["from both"] for row in rows]
    report.claim(
        "accuracy of the student of both, against the better one of one",
        both,
        [max(row["from left"], row["from right"]) for row in rows],
        margin=0.02,
    )
    report.claim(
        "accuracy of the student of both, against the mean of the two",
        both,
        [(row["from left"] + row["from right"]) / 2 for row in rows],
    )
    for name in (LEFT, RIGHT):
        report.claim(
            f"loyalty to the {name} teacher of its own student, against that of both's",
            [row[f"{name} to {name}"] for row in rows],
            [row[f"both to {name}"] for row in rows],
            margin=0.05,
        )


def _half(images: Tensor, first: int) -> Tensor:
    return images.view(-1, 8, 8)[:, :, first : first + 4].flatten(1)


def _network(inputs: int, hidden: int, seed: int) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


def _fit(model: nn.Module, images: Tensor, train: Tensor, loss, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for at in torch.randperm(len(train), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss(model(images[train[at]]), train[at]).backward()
            optimizer.step()


def _accuracy(logits: Tensor, classes: Tensor) -> float:
    return (logits.argmax(-1) == classes).float().mean().item()


@torch.no_grad()
def _speed() -> dict[str, float]:
    """Of a BERT of width 256 and the paper's vocabulary: forward of 8 x 64 tokens, median of 7."""
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        whole = BertModel(
            BertConfig(vocab_size=50_000, hidden_size=256, intermediate_size=1024,
                       num_attention_heads=4)
        ).eval()  # fmt: skip
    half, ids = take_layers(whole, LAYERS), torch.arange(512).view(8, 64)
    seconds: dict[str, list[float]] = {"12": [], "6": []}
    for _ in range(7):
        for name, model in (("12", whole), ("6", half)):
            since = time.perf_counter()
            model(ids)
            seconds[name].append(time.perf_counter() - since)
    medians = {name: sorted(each)[3] for name, each in seconds.items()}
    sizes = [sum(p.numel() for p in model.parameters()) for model in (whole, half)]
    return {
        "times as fast with 6 of 12": medians["12"] / medians["6"],
        "share of the parameters": sizes[1] / sizes[0],
    }
