"""Teacher hacking where the truth is known: a byte-level language model of the standard library is
the oracle, a teacher is tuned on its samples, a student is distilled from the teacher.

Oracle: 8 symbols of context, 256 hidden. On its responses of 24 symbols to 4,000 prompts a teacher
(6 symbols, 128 hidden) takes 1,500 steps and a student (8 symbols, 192 hidden) 1,000; then 1,500
steps of forward KL on responses to 8 prompts: stored ones, one or four to each, stored ones to four
times as many prompts, and new ones at each step, of the teacher or of the student.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stillhouse.methods.language import HackingStudy, Trace, detect
from stillhouse.recipes.language.byte_lm import CONTEXT, ByteLM, ByteText, CausalByteLM, train
from stillhouse.report import Report
from stillhouse.train import power_law_fit, rollout

ORACLE_STEPS, TEACHER_STEPS, STUDENT_STEPS, STEPS = 2500, 1500, 1000, 1500
TUNING, PROMPTS, VALIDATION, LENGTH = 4000, 8, 150, 24
ROWS = 256  # contexts a step
# The last two are reported for the first seed only.
RUNS = {
    "offline": dict(source="offline_teacher", count=PROMPTS),
    "4 times the prompts": dict(source="offline_teacher", count=4 * PROMPTS),
    "online, teacher": dict(source="online_teacher", count=PROMPTS),
    "4 responses a prompt": dict(source="offline_teacher", count=PROMPTS, generations=4),
    "online, student": dict(source="online_student", count=PROMPTS),
}
FITTED = (100, STEPS)  # steps of the power law


class Windows:
    """Contexts and next symbols of the responses [n, 8 + 24], drawn with replacement."""

    def __init__(self, ids: Tensor):
        self.windows = ids.unfold(1, CONTEXT + 1, 1).flatten(0, 1)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = self.windows[torch.randint(len(self.windows), (ROWS,), generator=generator)]
        return drawn[:, :CONTEXT], drawn[:, CONTEXT]


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    text = ByteText()
    oracle = ByteLM(context=8, width=16, hidden=256, seed=1)
    train(oracle, text, _label_loss, steps=ORACLE_STEPS, learning_rate=3e-3, seed=0)
    oracle = CausalByteLM(oracle.requires_grad_(False))

    rows: list[dict[str, object]] = []
    for seed in report.within(budget, seeds):
        study = _study(oracle, text, seed)
        names = list(RUNS) if len(report.seeds) == 1 else list(RUNS)[:3]
        traces = {name: _run(study, RUNS[name]) for name in names}
        rows += [_row(name, seed, trace, study) for name, trace in traces.items()]
        if len(report.seeds) == 1:
            _plot(report, traces)
    report.table("distances in nats a token", rows)
    _claims(report, rows)


def _label_loss(logits: Tensor, contexts: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets)


def _study(oracle: CausalByteLM, text: ByteText, seed: int) -> HackingStudy:
    generator = torch.Generator().manual_seed(seed)
    needed = TUNING + 4 * PROMPTS + VALIDATION
    drawn = torch.cat([text.batch(generator)[0] for _ in range(needed // 200)])
    # No prompt twice, or those of training and validation could meet.
    prompts = drawn.unique(dim=0)
    prompts = prompts[torch.randperm(len(prompts), generator=generator)][:needed]
    tuning, kept, validation = prompts.split([TUNING, 4 * PROMPTS, VALIDATION])
    data = Windows(rollout(oracle, tuning, max_new_tokens=LENGTH, seed=seed).ids)
    models = []
    for sizes, steps in (((6, 12, 128), TEACHER_STEPS), ((8, 16, 192), STUDENT_STEPS)):
        model = ByteLM(*sizes, seed=10 * len(models) + seed + 2)
        train(model, data, _label_loss, steps=steps, learning_rate=3e-3, seed=seed)
        models.append(CausalByteLM(model))
    return HackingStudy(
        oracle,
        *models,
        kept,
        validation=validation,
        max_new_tokens=LENGTH,
        tuning_prompts=tuning,
        seed=seed,
    )


def _run(study: HackingStudy, options: dict) -> Trace:
    adam = functools.partial(torch.optim.Adam, lr=3e-3)
    return study.run(**options, steps=STEPS, batch=-(-ROWS // LENGTH), optimizer=adam)


def _row(name: str, seed: int, trace: Trace, study: HackingStudy) -> dict[str, object]:
    found, law = detect(trace), power_law_fit(trace.steps, trace.proxy, window=FITTED)
    return {
        "run": name,
        "seed": seed,
        "proxy, start": trace.proxy[0],
        "proxy, end": trace.proxy[-1],
        "golden, start": trace.golden[0],
        "golden, end": trace.golden[-1],
        "rise": trace.rise,
        "golden of the teacher": study.golden_teacher,
        "slope": -law.b,
        "departs at": found["departure_step"],
        "hacked": found["hacked"],
    }


def _plot(report: Report, traces: dict[str, Trace]) -> None:
    report.curve(
        "plane",
        {name: trace.proxy for name, trace in traces.items()},
        {name: trace.golden for name, trace in traces.items()},
        xlabel="distance to the teacher, nats a token",
        ylabel="distance to the oracle",
    )
    for key in ("proxy", "golden"):
        steps = {name: trace.steps for name, trace in traces.items()}
        series = {name: getattr(trace, key) for name, trace in traces.items()}
        report.curve(key, steps, series, ylabel=f"{key}, nats a token")


def _claims(report: Report, rows: list[dict[str, object]]) -> None:
    def of(name: str, key: str) -> list[float]:
        return [row[key] for row in rows if row["run"] == name]

    def scaled(factor: float, values: list[float]) -> list[float]:
        return [factor * value for value in values]

    rise, online = of("offline", "rise"), "online, teacher"
    report.claim("golden distance, rise from its minimum to the end, offline", rise, 0.06)
    report.claim(
        "the same with 4 times the prompts, against 0.8 of it",
        of("4 times the prompts", "rise"),
        scaled(0.8, rise),
        relation="<=",
    )
    report.claim(
        "the same online, against 0.4 of it", of(online, "rise"), scaled(0.4, rise), relation="<="
    )
    report.claim(
        "distance to the teacher at the end online, against 0.2 of that at the start",
        of(online, "proxy, end"),
        scaled(0.2, of(online, "proxy, start")),
        relation="<=",
    )
    report.claim(
        f"slope of the proxy in logarithms, steps {FITTED[0]} to {FITTED[1]}, online",
        of(online, "slope"),
        -0.4,
        relation="<=",
    )
    report.claim("the same offline", of("offline", "slope"), -0.1)
