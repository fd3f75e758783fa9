"""TAID on a byte-level language model: does the moving target start softly and end between
forward and reverse KL?

Teacher: 8 symbols of context, 256 hidden. Student: 2 symbols, 16 hidden, 200 steps of
fine-tuning first; then 1,500 steps of 512 contexts with each objective, from the same student on
the same batches. No large win is claimed at this scale.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch.nn.functional import cross_entropy

from stillhouse import ops
from stillhouse.methods.language import TAIDLoss, taid_loss
from stillhouse.recipes.language.byte_lm import ByteLM, ByteText, distill, label_loss, train
from stillhouse.report import Report
from stillhouse.train import DivergenceObjective

TEACHER_STEPS = 2500
TUNING_STEPS = 200
STEPS = 1500
OBJECTIVES = {
    "forward KL": lambda: DivergenceObjective("forward_kl"),
    "reverse KL": lambda: DivergenceObjective("reverse_kl"),
    "TAID, linear": lambda: TAIDLoss(adaptive=False),
    "TAID, auto": lambda: TAIDLoss(alpha="auto"),
}


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    text = ByteText()
    teacher = ByteLM(context=8, width=16, hidden=256, seed=1)
    train(teacher, text, label_loss, steps=TEACHER_STEPS, learning_rate=3e-3, seed=0)
    teacher.requires_grad_(False)

    rows, softness = [], []
    for seed in report.within(budget, seeds):
        start = ByteLM(context=2, width=8, hidden=16, seed=10 + seed)
        train(
            start,
            text,
            label_loss,
            steps=TUNING_STEPS,
            learning_rate=5e-3,
            decay=False,
            seed=seed,
        )
        softness.append(_first_gradient_ratio(start, teacher, text, seed))
        traces = {}
        for name, make in OBJECTIVES.items():
            student = deepcopy(start)
            traces[name] = distill(
                student, teacher, text, make(), steps=STEPS, learning_rate=5e-3, seed=100 + seed
            )
            rows.append({"objective": name, "seed": seed, **_fidelity(student, teacher, text)})
        if len(report.seeds) == 1:
            _plot_traces(report, traces)

    measured = {
        name: {key: [row[key] for row in rows if row["objective"] == name] for key in rows[0]}
        for name in OBJECTIVES
    }
    report.table("fidelity to the teacher, held out", rows)
    report.curve(
        "plane",
        {name: columns["forward KL"] for name, columns in measured.items()},
        {name: columns["reverse KL"] for name, columns in measured.items()},
        xlabel="forward KL to the teacher, nats",
        ylabel="reverse KL, nats",
        points=True,
    )
    taid, forward = measured["TAID, linear"], measured["forward KL"]
    report.claim("first-step gradient norm at t = 0.4 / forward KL's", softness, 0.6, relation="<=")
    report.claim(
        "linear TAID's forward KL / that of forward KL's student",
        _ratio(taid, forward, "forward KL"),
        1.0,
        margin=0.03,
        relation="<=",
    )
    report.claim(
        "linear TAID's reverse KL / that of forward KL's student",
        _ratio(taid, forward, "reverse KL"),
        1.0,
        relation="<=",
    )
    report.claim(
        "linear TAID's acceptance, against that of forward KL's student",
        taid["acceptance"],
        forward["acceptance"],
        margin=-0.001,
    )


def _first_gradient_ratio(student: ByteLM, teacher: ByteLM, text: ByteText, seed: int) -> float:
    contexts, _ = text.batch(torch.Generator().manual_seed(100 + seed))
    student_logits = student(contexts).detach().requires_grad_()
    losses = (
        taid_loss(student_logits, teacher(contexts), t=0.4),
        ops.divergence_loss(student_logits, teacher(contexts), "forward_kl"),
    )
    norms = [torch.autograd.grad(loss, student_logits)[0].norm() for loss in losses]
    return (norms[0] / norms[1]).item()


@torch.no_grad()
def _fidelity(student: ByteLM, teacher: ByteLM, text: ByteText) -> dict[str, float]:
    contexts, targets = text.held_out
    student_logits, teacher_logits = student(contexts), teacher(contexts)
    forward, stats = ops.divergence(student_logits, teacher_logits, "forward_kl", return_stats=True)
    return {
        "forward KL": forward.mean().item(),
        "reverse KL": ops.divergence(student_logits, teacher_logits, "reverse_kl").mean().item(),
        "acceptance": stats.acceptance.mean().item(),
        "agreement": stats.agreement.mean().item(),
        "cross-entropy": cross_entropy(student_logits, targets).item(),
    }


def _ratio(above: dict, below: dict, key: str) -> list[float]:
    return [a / b for a, b in zip(above[key], below[key], strict=True)]


def _plot_traces(report: Report, traces: dict[str, dict[str, list[float]]]) -> None:
    """t(n), loss(n) and the KL to the moving target, every tenth step."""
    for key, label in (("t", "t"), ("loss", "loss, nats"), ("kl_to_target", "KL(p_t || q), nats")):
        series = {name: trace[key] for name, trace in traces.items() if key in trace}
        if key != "t":
            series = {name: _smooth(values) for name, values in series.items()}
        series = {name: values[::10] for name, values in series.items()}
        report.curve(key, range(1, STEPS + 1, 10), series, ylabel=label)


def _smooth(values: list[float], decay: float = 0.95) -> list[float]:
    average, out = values[0], []
    for value in values:
        average = decay * average + (1 - decay) * value
        out.append(average)
    return out
