"""MGSR on a byte-level language model: what a clipped teacher does to its student, and what the
correction of responses does to them.

Teacher: 8 symbols of context, 256 hidden. Student: 2 symbols, 16 hidden, 1,000 steps of fine-tuning
first; then 1,500 steps of 512 contexts with labels and each divergence, from the same student on
the same batches. The window (0, 0.9) is the honest arm: a learned one is trained to make its own
loss small. No claim is made for corrected responses: the table says what the teacher thinks of
them.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stillhouse import ops
from stillhouse.methods.language import MGSRLoss, revise
from stillhouse.recipes.language.byte_lm import (
    ByteLM,
    ByteText,
    CausalByteLM,
    distill,
    label_loss,
    train,
)
from stillhouse.report import Report
from stillhouse.train import LogitRows, Objective, Responses, rollout, row_divergence
from stillhouse.train.forward import row_forward
from stillhouse.train.rows import supervised_rows

TEACHER_STEPS, TUNING_STEPS, STEPS = 2500, 1000, 1500
PROMPTS, LENGTH = 256, 24


def plain(kind: str) -> Callable[[], Objective]:
    """Labels and this divergence, with weights 1 and 1."""

    def objective(student: LogitRows, teacher: LogitRows, batch: dict) -> dict[str, Tensor]:
        labels = row_divergence(student, None, "cross_entropy", labels=student.index.target)
        return {"loss": (labels + row_divergence(student, teacher, kind)).mean()}

    return lambda: objective


OBJECTIVES = {
    "forward KL": plain("forward_kl"),
    "window (0, 0.9)": lambda: MGSRLoss(weights=(1, 1, 0), window=(0.0, 0.9)),
    "learned window": lambda: MGSRLoss(weights=(1, 1, 0), features=32),
    # Of the first seed only.
    "reverse KL": plain("reverse_kl"),
    "symmetric KL": plain("symmetric_kl"),
    "JSD": plain("jsd"),
    "TVD": plain("tvd"),
}


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    text = ByteText()
    teacher = ByteLM(context=8, width=16, hidden=256, seed=1)
    train(teacher, text, label_loss, steps=TEACHER_STEPS, learning_rate=3e-3, seed=0)
    teacher.requires_grad_(False)

    rows, revised = [], []
    for seed in report.within(budget, seeds):
        start = ByteLM(context=2, width=8, hidden=16, seed=10 + seed)
        train(
            start, text, label_loss, steps=TUNING_STEPS, learning_rate=5e-3, decay=False, seed=seed
        )
        names = list(OBJECTIVES) if len(report.seeds) == 1 else list(OBJECTIVES)[:3]
        traces = {}
        for name in names:
            student, objective = deepcopy(start), OBJECTIVES[name]()
            traces[name] = distill(
                student, teacher, text, objective, steps=STEPS, learning_rate=5e-3, seed=100 + seed
            )
            rows.append({"loss": name, "seed": seed, **_fidelity(student, teacher, text)})
        if len(report.seeds) == 1:
            window = {key: traces["learned window"][key][::10] for key in ("lower", "upper")}
            report.curve("window", range(1, STEPS + 1, 10), window, ylabel="mass")
        revised.append({"seed": seed, **_revision(start, teacher, text, seed)})
    report.table("fidelity to the teacher, held out", rows)
    report.table("the teacher's nats a token of responses", revised)
    kinds = dict.fromkeys(row["loss"] for row in rows)
    report.curve(
        "plane",
        {name: _of(rows, name, "forward KL") for name in kinds},
        {name: _of(rows, name, "reverse KL") for name in kinds},
        xlabel="forward KL to the teacher, nats",
        ylabel="reverse KL, nats",
        points=True,
    )
    _claims(report, rows)


def _claims(report: Report, rows: list[dict]) -> None:
    plain, window = "forward KL", "window (0, 0.9)"
    report.claim(
        "reverse KL with the window (0, 0.9), against forward KL's student",
        _of(rows, window, "reverse KL"),
        _of(rows, plain, "reverse KL"),
        margin=-0.008,
        relation="<=",
    )
    report.claim(
        "its acceptance, against forward KL's student",
        _of(rows, window, "acceptance"),
        _of(rows, plain, "acceptance"),
        margin=0.001,
    )
    pairs = zip(_of(rows, window, "forward KL"), _of(rows, plain, "forward KL"), strict=True)
    report.claim(
        "its forward KL / that of forward KL's student",
        [a / b for a, b in pairs],
        1.02,
        relation="<=",
    )


def _of(rows: list[dict], name: str, key: str) -> list[float]:
    return [row[key] for row in rows if row["loss"] == name]


@torch.no_grad()
def _fidelity(student: ByteLM, teacher: ByteLM, text: ByteText) -> dict[str, float]:
    contexts, targets = text.held_out
    pair = student(contexts), teacher(contexts)
    forward, stats = ops.divergence(*pair, "forward_kl", return_stats=True)
    return {
        "forward KL": forward.mean().item(),
        "reverse KL": ops.divergence(*pair, "reverse_kl").mean().item(),
        "acceptance": stats.acceptance.mean().item(),
        "agreement": stats.agreement.mean().item(),
        "cross-entropy": cross_entropy(pair[0], targets).item(),
    }


def _revision(student: ByteLM, teacher: ByteLM, text: ByteText, seed: int) -> dict[str, float]:
    """How likely the teacher finds what the student says, before and after one correction."""
    generator = torch.Generator().manual_seed(seed)
    prompts, models = text.batch(generator)[0][:PROMPTS], (student, teacher)
    models = [CausalByteLM(model) for model in models]
    said = rollout(models[0], prompts, max_new_tokens=LENGTH, seed=seed)
    result = {"as they were": _nll(models[1], said)}
    for score in ("kl", "teacher_nll"):
        revised = revise(*models, said, score=score, seed=seed)
        result[f"revised by {score}"] = _nll(models[1], revised)
    changed = [not torch.equal(a, b) for a, b in zip(said.ids, revised.ids, strict=True)]
    return result | {"share changed": sum(changed) / len(changed)}


@torch.no_grad()
def _nll(teacher: CausalByteLM, responses: Responses) -> float:
    batch = responses.batch()
    index = supervised_rows(batch["labels"])
    rows = row_forward(teacher)(batch, index)
    return row_divergence(rows, None, "cross_entropy", labels=index.target).mean().item()
