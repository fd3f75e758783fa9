"""LLaVA-MoD on two domains: do experts, taught by the same teacher, come closer to it than a dense
student that computes as much, do they divide the domains among them, and does a student that
learns from pairs tell a true continuation from one with a foreign word better than its teacher?

Teacher: 2 blocks of width 128, 2,000 steps of 16 windows. Students: 2 blocks of width 32. The dense
ones have 32 inner units; the one that becomes a mixture has 16, and then 4 experts of 16 of which a
token gets 2. All take 2,000 steps, the mixtures half of them dense ("D2D") and half as mixtures
("D2S"). All of a mixture learns. In the paper only experts and routers do, of a student that was
trained for long before: here that is better than the dense start, trained on, and worse than the
dense student of equal cost. Preferences are reported without a claim.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.methods.language import LLaVAMoDLoss
from stillhouse.nn.moe import TopK, upcycle_
from stillhouse.recipes.language.expert_use import choices_of, routing_of
from stillhouse.recipes.language.two_domains import DOMAINS, BlockLM, TwoDomains
from stillhouse.report import Report
from stillhouse.train import (
    DivergenceObjective,
    Stage,
    Taught,
    fidelity,
    run_stages,
    sequence_logprobs,
)

WIDTH, INNER, DEPTH = 32, 16, 2
TEACHER_STEPS, STEPS = 2000, 2000
RATE, TEACHER_RATE = 5e-3, 3e-3
WINDOWS = 8  # of each domain, a step
HELD = 256  # of each domain
PREFERENCE_STEPS, PREFERENCE_RATE = 150, 1e-3
PAIRS, PAIRS_A_STEP, HELD_PAIRS = 2048, 32, 1024
EXPERTS = ("*.experts.*", "*.router.*")

_History = list[dict[str, Any]]


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    text = TwoDomains()
    held, domains = text.windows(HELD, torch.Generator().manual_seed(9), held=True)
    study = _Study(text, _batch(held))
    labels = Taught(DivergenceObjective("cross_entropy"))
    teacher = BlockLM(4 * WIDTH, 8 * WIDTH, DEPTH, seed=1)
    run_stages(teacher, [study.stage("teacher", labels, TEACHER_STEPS, 0, rate=TEACHER_RATE)])
    study.teacher = teacher
    mimic, half = Taught(LLaVAMoDLoss("mimic"), teacher), STEPS // 2
    uneven = Taught(LLaVAMoDLoss("mimic", balance=0.0), teacher)

    rows, routing, preferences = [], [], []
    for seed in report.within(budget, seeds):
        start, first = study.dense(INNER, mimic, half, seed)
        students = {
            "dense, labels": study.dense(2 * INNER, labels, STEPS, seed),
            "dense, KD": study.dense(2 * INNER, mimic, STEPS, seed),
            "mixture, KD": study.goes_on(start, mimic, seed),
            "mixture, KD, no balance": study.goes_on(start, uneven, seed),
            "mixture, KD, experts only": study.goes_on(start, mimic, seed, parameters=EXPERTS),
            "its dense start, KD": study.goes_on(start, mimic, seed, upcycle=False),
        }
        for name, (model, _) in students.items():
            rows.append({"student": name, "seed": seed, **study.fidelity(model)})
        for name in ("mixture, KD", "mixture, KD, no balance"):
            measured = routing_of(students[name][0], held, domains, seed)
            routing.append({"student": name, "seed": seed, **measured})
        mixture, second = students["mixture, KD"]
        preferences += study.preferences(mixture, seed)
        if len(report.seeds) == 1:
            _plot(report, students["dense, KD"][1], [*first, *second], mixture, held)

    report.table("distance from the teacher, held out", rows)
    report.table("routing of held-out text", routing)
    report.table("pairs of a true continuation and one with a foreign word", preferences)
    _claims(report, rows, routing)


def _claims(report: Report, rows: list[dict], routing: list[dict]) -> None:
    def of(name: str, key: str = "forward_kl", table: list[dict] = rows) -> list[float]:
        return [row[key] for row in table if row["student"] == name]

    def ratio(above: str, below: str) -> list[float]:
        return [a / b for a, b in zip(of(above), of(below), strict=True)]

    kd, mixture = "dense, KD", "mixture, KD"
    below = {"relation": "<="}
    report.claim("KL of the mixture / of the dense student, KD", ratio(mixture, kd), 0.98, **below)
    report.claim("KL of the dense student, KD / labels", ratio(kd, "dense, labels"), 1.0, **below)
    report.claim(
        "where experts and routers alone learn: KL / that of the dense start, trained on",
        ratio("mixture, KD, experts only", "its dense start, KD"),
        0.98,
        **below,
    )
    p = of(mixture, "p", routing)
    report.claim("domains and experts are independent: p, by permutation", p, 0.01, **below)
    load = of(mixture, "largest load", routing)
    report.claim("the fullest expert's load / the mean, balance 0.01", load, 2.0, **below)
    without = of("mixture, KD, no balance", "largest load", routing)
    report.claim("the same without balance, against it", without, load)


class _Study:
    """What all runs share: the text, what is held out of it, the teacher."""

    def __init__(self, text: TwoDomains, held: dict[str, Any]):
        self.text, self.held = text, held
        self.teacher: BlockLM | None = None
        generator = torch.Generator().manual_seed(5)
        self.pairs = text.pairs(PAIRS // 2, generator)
        self.held_pairs = text.pairs(HELD_PAIRS // 2, generator, held=True)

    def stage(
        self, name: str, loss: Taught, steps: int, seed: int, *, rate: float = RATE, **options: Any
    ) -> Stage:
        generator = torch.Generator().manual_seed(seed)

        def data(step: int) -> dict[str, Any]:
            return _batch(self.text.windows(WINDOWS, generator)[0])

        return Stage(name, loss, steps, data=data, lr=rate, optimizer=_falling(steps), **options)

    def dense(self, inner: int, loss: Taught, steps: int, seed: int) -> tuple[BlockLM, _History]:
        model = BlockLM(WIDTH, inner, DEPTH, seed=10 + seed)
        return model, run_stages(model, [self.stage("dense", loss, steps, 100 + seed)])

    def goes_on(
        self,
        start: BlockLM,
        loss: Taught,
        seed: int,
        *,
        parameters: Sequence[str] = ("*",),
        upcycle: bool = True,
    ) -> tuple[BlockLM, _History]:
        """A copy of the student that has done half of the steps does the others."""

        def prepare(model: BlockLM) -> None:
            if upcycle:
                upcycle_(model, TopK(2, noise="gumbel"), layers="all", seed=seed)

        model, options = copy.deepcopy(start), {"parameters": parameters, "prepare": prepare}
        stage = self.stage("goes on", loss, STEPS - STEPS // 2, 200 + seed, **options)
        return model, run_stages(model, [stage])

    def fidelity(self, model: nn.Module) -> dict[str, float]:
        found = fidelity(model, self.teacher, [self.held])
        return {name: found[name] for name in ("forward_kl", "agreement", "loss")}

    def preferences(self, student: nn.Module, seed: int) -> list[dict[str, Any]]:
        """The teacher, the student, and the student after the stage, by its reference."""
        references = {"teacher": self.teacher, "itself before": copy.deepcopy(student)}
        rows = [
            {"model": "teacher", "seed": seed, **self._told_apart(self.teacher)},
            {"model": "student", "seed": seed, **self._told_apart(student)},
        ]
        generator = torch.Generator().manual_seed(300 + seed)
        order = [
            torch.randint(PAIRS, (PAIRS_A_STEP,), generator=generator)
            for _ in range(PREFERENCE_STEPS)
        ]
        for name, reference in references.items():
            model = copy.deepcopy(student)
            stage = Stage(
                "preference",
                Taught(LLaVAMoDLoss("preference"), reference),
                PREFERENCE_STEPS,
                data=lambda step: _some(self.pairs, order[step]),
                lr=PREFERENCE_RATE,
                optimizer=_falling(PREFERENCE_STEPS),
            )
            run_stages(model, [stage])
            named = {"model": f"student, reference: {name}", "seed": seed}
            rows.append(named | self._told_apart(model))
        return rows

    @torch.no_grad()
    def _told_apart(self, model: nn.Module) -> dict[str, float]:
        was_training = model.training
        logprobs = sequence_logprobs(model.eval(), self.held_pairs)
        model.train(was_training)
        margin = logprobs[:HELD_PAIRS] - logprobs[HELD_PAIRS:]
        half = HELD_PAIRS // 2
        return {
            "accuracy": (margin > 0).float().mean().item(),
            "source": (margin[:half] > 0).float().mean().item(),
            "packages": (margin[half:] > 0).float().mean().item(),
            "margin, nats": margin.mean().item(),
            "KL to the teacher": fidelity(model, self.teacher, [self.held])["forward_kl"],
        }


def _batch(ids: Tensor) -> dict[str, Any]:
    return {"input_ids": ids, "labels": ids}


def _some(pairs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    both = torch.cat([rows, rows + PAIRS])
    return {"pairs": len(rows)} | {k: pairs[k][both] for k in ("input_ids", "labels")}


def _falling(steps: int) -> Callable[..., torch.optim.Optimizer]:
    """Adam whose rate falls linearly to a fiftieth."""

    def make(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99), foreach=True)
        done = itertools.count(1)

        def fall(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            optimizer.param_groups[0]["lr"] = lr * max(1 - next(done) / steps, 0.02)

        optimizer.register_step_post_hook(fall)
        return optimizer

    return make


def _plot(
    report: Report, dense: _History, mixture: _History, model: nn.Module, held: Tensor
) -> None:
    """KL while training, means of 40 steps; and who gets which domain."""
    curves = {
        name: torch.tensor([row["kl"] for row in rows][: len(rows) // 40 * 40]).view(-1, 40).mean(1)
        for name, rows in (("dense", dense), ("mixture", mixture))
    }
    steps = {name: range(40, 40 * len(curve) + 1, 40) for name, curve in curves.items()}
    report.curve("kl", steps, curves, ylabel="KL to the teacher, nats")
    choices = choices_of(model, held).view(-1, 2, HELD, 4).sum(2)  # [mixtures, domains, E]
    shares = (choices / choices.sum(-1, keepdim=True)).transpose(0, 1).flatten(1)
    report.curve(
        "experts",
        range(shares.shape[1]),
        dict(zip(DOMAINS, shares, strict=True)),
        xlabel="expert, block after block",
        ylabel="share of choices",
        points=True,
    )
