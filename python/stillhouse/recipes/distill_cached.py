"""`make distill-cached`: the demonstration once with its teacher and once from what it has stored.

Captures 64 columns of every row, the 32 largest and 32 drawn from the others, trains from them and,
on the same batches, with the model itself; the report says what that changes: perplexity, time,
bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from stillhouse.errors import exit_code
from stillhouse.recipes import distill
from stillhouse.recipes.capture import CaptureArguments, capture
from stillhouse.report import Report
from stillhouse.teachers import TeacherShards
from stillhouse.train.arguments import parse

FOLDER = Path("runs/smollm2-cached")
# TAID mixes the student into whole rows of the teacher, which are not stored.
SHARED = ["--method", "forward_kl", "--label_weight", "0.5", "--control", "false"]
# The 64 largest alone hold nine tenths of the mass: a student never hears of the rest.
DRAWS = 32


def main(argv: Sequence[str]) -> int:
    """`argv`: flags for both trainings, such as `--max_steps 20`."""
    words = list(argv)
    return exit_code(lambda: compare(words))


def compare(words: Sequence[str]) -> Report:
    """Capture, train twice, report."""
    shards, shared = FOLDER / "shards", [*SHARED, *words]
    demonstration = yaml.safe_load(distill.DEMONSTRATION.read_text(encoding="utf-8"))
    same = ("teacher", "teacher_dtype", "data", "max_length", "eval_share")
    captured = capture(
        CaptureArguments(
            **{name: demonstration[name] for name in same},
            out=str(shards),
            draws=DRAWS,
            overwrite=True,
        )
    )
    student = f"{demonstration['student']}@{demonstration['teacher']}"
    changes = {
        "online": [],
        "cached": ["--teacher_shards", str(shards), "--student", student],
    }
    reports = {}
    for name, flags in changes.items():
        print(f"\n==> {name}", flush=True)
        config = ["--config", str(distill.DEMONSTRATION), "--output_dir", str(FOLDER / name)]
        reports[name] = distill.distill(*parse([*config, *shared, *flags]))
    return _report(captured, TeacherShards(shards, verify=False), reports)


def _report(captured: Report, shards: TeacherShards, reports: dict[str, Report]) -> Report:
    online = reports["online"]
    perplexity = {name: each.values["perplexity"]["student"] for name, each in reports.items()}
    per_step = {
        name: each.values["seconds"]["total"] / each.values["steps"]["student"]
        for name, each in reports.items()
    }
    seconds = online.values["seconds"]
    share = seconds["teacher"] / seconds["total"]
    report = Report(FOLDER.name, FOLDER)
    report.table(
        "the same batches, the same objective",
        [
            {
                "teacher": "the model"
                if name == "online"
                else f"{shards.schema.k} columns, stored",
                "perplexity": perplexity[name],
                "s a step": per_step[name],
                "of that its teacher": each.values["seconds"]["teacher"]
                / each.values["seconds"]["total"],
            }
            for name, each in reports.items()
        ],
    )
    for name in ("bytes_per_row", "rows_per_second", "over_bare_forward"):
        report.value(name, captured.values[name])
    report.value("perplexity", perplexity)
    report.value("seconds_per_step", per_step)
    report.value("teacher_share", share)
    report.claim(
        "perplexity from the shards over that with the model",
        perplexity["cached"] / perplexity["online"],
        1.02,
        seeds=[0],
        relation="<=",
    )
    report.claim(
        "seconds a step from the shards over those with the model, less the teacher's share",
        per_step["cached"] / per_step["online"] - (1 - share),
        0.0,
        0.05,
        seeds=[0],
        relation="<=",
    )
    report.claim(
        "seconds of the capture over those of the teacher's bare forward",
        captured.values["over_bare_forward"],
        1.1,
        seeds=[0],
        relation="<=",
    )
    series = {name: each.curves["loss"]["series"]["forward_kl"] for name, each in reports.items()}
    report.curve(
        "loss",
        {name: x for name, (x, _) in series.items()},
        {name: y for name, (_, y) in series.items()},
        ylabel="forward KL (nats a token)",
    )
    report.save()
    return report


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
