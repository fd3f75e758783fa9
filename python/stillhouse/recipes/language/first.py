"""FIRST on a byte-level language model whose teacher has learned its text by heart: is a student of
five re-calibrated tokens as right as one of labels, and does its confidence mean more?

Teacher: 8 symbols of context, 192 hidden, 2,500 steps on 12,000 contexts only, at a rate at which
its calibration error is 0.30 in the end. Students: 6 symbols, 96 hidden, on the same contexts:
labels, the teacher's five largest probabilities as they are, and these re-calibrated by 4,000
held-out contexts. Measured on 8,000 others.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stillhouse import ops
from stillhouse.methods.language import FIRSTLoss, fit_temperature
from stillhouse.recipes.language.byte_lm import BATCH, ByteLM, ByteText, train
from stillhouse.report import Report
from stillhouse.train import LogitRows, RowIndex, ece, reliability

CONTEXTS, VALIDATION, TEST = 12_000, 4_000, 8_000
STEPS = 2500
K = 5
LABELS, PLAIN, FIRST = "labels", "top 5", "FIRST"


class FewContexts(ByteText):
    """12,000 fixed contexts, of which a batch gives the numbers, and two held-out sets from text
    that neither shares with the other."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        size = len(self.symbols)
        middle = (self.split + size) // 2
        self.contexts, self.targets = self._contexts(CONTEXTS, 8, self.split, generator)
        self.validation = self._contexts(VALIDATION, self.split + 8, middle, generator)
        self.test = self._contexts(TEST, middle + 8, size, generator)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(CONTEXTS, (BATCH,), generator=generator)
        return self.contexts[rows], rows


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    measured: list[dict[str, object]] = []
    kept: list[dict[str, float]] = []
    for seed in report.within(budget, seeds):
        text = FewContexts(seed)

        def of_labels(logits: Tensor, contexts: Tensor, rows: Tensor, text=text) -> Tensor:
            return cross_entropy(logits, text.targets[rows])

        teacher = ByteLM(context=8, width=16, hidden=192, seed=1 + seed)
        train(teacher, text, of_labels, steps=STEPS, learning_rate=4e-3, seed=seed)
        teacher.requires_grad_(False)
        stored = ops.SparseTeacher.from_logits(teacher(text.contexts), k=K, tail="renormalize")
        contexts, targets = text.validation
        held = ops.SparseTeacher.from_logits(teacher(contexts), k=K, tail="renormalize")
        c, curve = fit_temperature(held, targets)
        kept.append(
            {
                "seed": seed,
                "c": c,
                "ECE at c": curve[c],
                "ECE as it is": _top_ece(held, targets),
                "mass of five, training": _mass(stored),
                "mass of five, held out": _mass(held),
            }
        )
        losses: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
            LABELS: of_labels,
            PLAIN: _objective(FIRSTLoss(None), stored, text),
            FIRST: _objective(FIRSTLoss(c), stored, text),
        }
        models = {"teacher": teacher}
        for name, loss in losses.items():
            models[name] = ByteLM(context=6, width=16, hidden=96, seed=10 + seed)
            train(models[name], text, loss, steps=STEPS, learning_rate=3e-3, seed=100 + seed)
        for name, model in models.items():
            measured.append({"model": name, "seed": seed, **_quality(model, text)})
        if len(report.seeds) == 1:
            report.curve("ece_of_c", list(curve), {"held out": list(curve.values())}, xlabel="c")
            _reliability(report, models, text)

    report.table("the teacher's five tokens", kept)
    report.table("held-out quality", measured)
    of = {
        name: {key: [row[key] for row in measured if row["model"] == name] for key in measured[0]}
        for name in (LABELS, PLAIN, FIRST)
    }
    for other, margin in ((LABELS, -0.015), (PLAIN, -0.03)):
        report.claim(
            f"FIRST's calibration error, against that of the student of {other}",
            of[FIRST]["ECE"],
            of[other]["ECE"],
            margin=margin,
            relation="<=",
        )
    report.claim(
        "FIRST's accuracy, against that of the student of labels",
        of[FIRST]["accuracy"],
        of[LABELS]["accuracy"],
        margin=-0.015,
    )
    report.claim(
        "FIRST's nats a symbol, against those of the student of labels",
        of[FIRST]["nats"],
        of[LABELS]["nats"],
        relation="<=",
    )


def _objective(
    objective: FIRSTLoss, stored: ops.SparseTeacher, text: FewContexts
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss of a batch by the numbers of its contexts: the teacher itself is not asked again."""

    def loss(logits: Tensor, contexts: Tensor, rows: Tensor) -> Tensor:
        here = torch.arange(len(rows))
        index = RowIndex(row=here, target=text.targets[rows], sequence=here)
        some = ops.SparseTeacher(
            stored.ids[rows], stored.log_probs[rows], stored.vocab_size, 1.0, stored.tail
        )
        return objective(LogitRows(logits, index), some, {})["loss"]

    return loss


@torch.no_grad()
def _predictions(model: ByteLM, text: FewContexts) -> tuple[Tensor, Tensor]:
    contexts, targets = text.test
    confidence, predicted = model(contexts).softmax(-1).max(-1)
    return confidence, predicted == targets


@torch.no_grad()
def _quality(model: ByteLM, text: FewContexts) -> dict[str, float]:
    confidence, correct = _predictions(model, text)
    accuracy, error = correct.float().mean().item(), ece(confidence, correct)
    contexts, targets = text.test
    return {
        "accuracy": accuracy,
        "ECE": error,
        "trust": accuracy - error,
        "nats": cross_entropy(model(contexts), targets).item(),
    }


def _reliability(report: Report, models: dict[str, ByteLM], text: FewContexts) -> None:
    bars = {name: reliability(*_predictions(model, text)) for name, model in models.items()}
    filled = {name: each.count > 20 for name, each in bars.items()}
    report.curve(
        "reliability",
        {name: each.confidence[filled[name]] for name, each in bars.items()} | {"ideal": [0, 1]},
        {name: each.accuracy[filled[name]] for name, each in bars.items()} | {"ideal": [0, 1]},
        xlabel="confidence",
        ylabel="share of right predictions",
    )


def _top_ece(teacher: ops.SparseTeacher, targets: Tensor) -> float:
    """Of the largest of the five, scaled to sum 1 but not re-calibrated."""
    top, place = teacher.log_probs.softmax(-1).max(-1, keepdim=True)
    return ece(top[:, 0], teacher.ids.gather(1, place)[:, 0] == targets)


def _mass(teacher: ops.SparseTeacher) -> float:
    return teacher.log_probs.exp().sum(-1).mean().item()
