"""DB-LLM on a small language model of package descriptions: what do two bits a weight cost, how
much of it do free scales win back from the teacher, and does the weight by entropies help?

Teacher: a Llama of 4 blocks of width 64, 500 steps. Its 28 linear layers are quantized in groups of
64: as 2-bit integers (scales from the largest weight), by least squares, and the latter with
scales that then learn for 100 steps of 12 windows of 128 tokens, from the teacher's distributions
alone: as they are (KD), and weighted (DAD). Which of these two is better is reported without a
claim.
The first table has no language in it: groups of 64 normal numbers.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import ops
from stillhouse.methods.compression import EntropyWeightedLoss, freeze_fdb_, quantize_fdb_
from stillhouse.nn import fdb_fit
from stillhouse.recipes.language.package_lm import PackageText, package_lm
from stillhouse.report import Report
from stillhouse.train import DivergenceObjective, Stage, Taught, fidelity, run_stages

GROUP = 64
STEPS, BATCH, LENGTH, RATE = 100, 12, 128, 3e-3
HELD = 96  # windows
NORMAL = 4096  # groups
INTEGER, FITTED, KD, DAD = "2-bit integers", "least squares", "and KD", "and DAD"
QUARTERS = ("lowest", "second", "third", "highest")


class Windows:
    """Windows of 128 tokens: of a step for training, and the held-out ones."""

    def __init__(self, text: PackageText):
        self.stream = torch.tensor([token for line in text.lines for token in line])
        held = [token for block in text.held_out for line in block for token in line]
        self.held = torch.tensor(held[: HELD * LENGTH]).view(HELD, LENGTH)

    def step(self, step: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        first = torch.randint(len(self.stream) - LENGTH, (BATCH,), generator=generator)
        return _batch(self.stream[first[:, None] + torch.arange(LENGTH)])

    def held_out(self) -> Iterator[dict[str, Tensor]]:
        return map(_batch, self.held.split(16))


def _batch(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids}


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    text = PackageText()
    windows = Windows(text)
    errors, rows, quarters = [], [], []
    for seed in report.within(budget, seeds):
        errors.append({"seed": seed, **_errors_of_normal_groups(seed)})
        teacher = package_lm(text, seed)
        integer, _ = _quantized(teacher, "paper")
        fitted, sizes = _quantized(teacher, "ls")
        students = {INTEGER: integer, FITTED: fitted}
        losses = {}
        objectives = {KD: DivergenceObjective("forward_kl"), DAD: EntropyWeightedLoss()}
        for name, objective in objectives.items():
            students[name] = copy.deepcopy(fitted)
            losses[name] = _teach(students[name], Taught(objective, teacher), windows, seed)
        for name, student in students.items():
            freeze_fdb_(student)
            found = fidelity(student, teacher, windows.held_out())
            kept = ("perplexity", "reference_perplexity", "forward_kl", "acceptance")
            rows.append({"weights": name, "seed": seed} | {key: found[key] for key in kept})
            by_entropy = _by_entropy(student, teacher, windows)
            quarters.append({"weights": name, "seed": seed} | by_entropy)
        if len(report.seeds) == 1:
            report.value("bytes", sizes)
            smooth = {name: _smooth(each) for name, each in losses.items()}
            report.curve("loss", range(1, STEPS + 1), smooth, ylabel="loss, nats (of each kind)")
    report.table("squared error of groups of 64 normal numbers", errors)
    report.table("held-out text", rows)
    report.table("KL to the teacher in quarters of its entropy", quarters)
    _claims(report, errors, rows)


def _claims(report: Report, errors: list[dict], rows: list[dict]) -> None:
    ways = [name for name in errors[0] if name != "seed"]
    margins = (0.02, 0.015, 0.006)
    for (worse, better), margin in zip(itertools.pairwise(ways), margins, strict=True):
        report.claim(
            f"squared error of normal groups: {better}, against {worse}",
            [row[better] for row in errors],
            [row[worse] for row in errors],
            margin=-margin,
            relation="<=",
        )

    def gap(name: str) -> list[float]:
        """By how much the perplexity is above the teacher's."""
        chosen = [row for row in rows if row["weights"] == name]
        return [row["perplexity"] - row["reference_perplexity"] for row in chosen]

    def share(above: str, below: str) -> list[float]:
        return [a / b for a, b in zip(gap(above), gap(below), strict=True)]

    text = "perplexity above the teacher's"
    report.claim(
        f"{text}: least squares / 2-bit integers", share(FITTED, INTEGER), 1.0, relation="<="
    )
    report.claim(f"{text}: KD / 2-bit integers", share(KD, INTEGER), 0.5, relation="<=")
    report.claim(f"{text}: KD / least squares", share(KD, FITTED), 1.0, relation="<=")
    differences = torch.tensor(gap(DAD)) - torch.tensor(gap(KD))
    spread = differences.std().item() / len(differences) ** 0.5 if len(differences) > 1 else None
    report.value("DAD - KD, perplexity", {"mean": differences.mean().item(), "error": spread})


def _quantized(teacher: nn.Module, method: str) -> tuple[nn.Module, dict[str, Any]]:
    student = copy.deepcopy(teacher)
    made = quantize_fdb_(student, GROUP, method=method)
    sizes = {"before": made.bytes_before, "after": made.bytes_after}
    return student, sizes | {"bits a quantized weight": made.bits_per_weight}


def _teach(student: nn.Module, taught: Taught, windows: Windows, seed: int) -> list[float]:
    stage = Stage(
        "scales",
        taught,
        STEPS,
        parameters="*.change",
        data=lambda step: windows.step(step, seed),
        lr=RATE,
        optimizer=lambda learning, lr: torch.optim.AdamW(learning, lr=lr, weight_decay=0.0),
    )
    return [row["loss"] for row in run_stages(student, [stage])]


@torch.no_grad()
def _by_entropy(student: nn.Module, teacher: nn.Module, windows: Windows) -> dict[str, float]:
    """Mean KL to the teacher, tokens in quarters of its entropy."""
    divergence, entropy = [], []
    for batch in windows.held_out():
        logits = [each(batch["input_ids"], use_cache=False).logits for each in (student, teacher)]
        value, stats = ops.divergence(*logits, "forward_kl", return_stats=True)
        divergence.append(value.flatten()), entropy.append(stats.teacher_entropy.flatten())
    order = torch.cat(entropy).argsort()
    parts = torch.cat(divergence)[order].tensor_split(4)
    return {name: part.mean().item() for name, part in zip(QUARTERS, parts, strict=True)}


def _errors_of_normal_groups(seed: int) -> dict[str, float]:
    groups = torch.randn(NORMAL, GROUP, generator=torch.Generator().manual_seed(seed))
    positive = fdb_fit.of_scale(fdb_fit.search_scale(groups, (1.0,)))
    scales = {
        "largest weight": fdb_fit.fit(groups, "paper"),
        "best positive scale": positive,
        "best scale": fdb_fit.fit(groups, "mse"),
        "least squares": fdb_fit.fit(groups, "ls"),
    }
    found = {name: fdb_fit.nearest(groups, alpha.float())[0] for name, alpha in scales.items()}
    return {name: (value - groups).square().mean().item() for name, value in found.items()}


def _smooth(values: list[float], decay: float = 0.9) -> list[float]:
    average, out = values[0], []
    for value in values:
        average = decay * average + (1 - decay) * value
        out.append(average)
    return out
