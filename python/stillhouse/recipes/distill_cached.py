"""`make distill-cached`: the demonstration once with its teacher and once from what it has stored.

Captures 64 columns of every row, the 32 largest and 32 drawn from the others, trains from them and,
on the same batches, with the model itself; the report says what that changes: perplexity, time,
bytes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from stillhouse.errors import UsageError, exit_code
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
    """Capture, train twice, report. Raises UsageError for wrong flags, before any of it."""
    if any(word.partition("=")[0].replace("-", "_") == "__output_dir" for word in words):
        raise UsageError(f"--output_dir is {FOLDER} here, with a folder for each training")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("this compares times: one process, without torchrun")
    config, shards = ["--config", str(distill.DEMONSTRATION)], str(FOLDER / "shards")
    flags = {name: [*config, *SHARED, *words] for name in ("online", "cached")}
    known, _ = parse(flags["online"])
    flags["cached"] += [
        "--teacher_shards", shards, "--student", f"{known.student}@{known.teacher}"
    ]  # fmt: skip
    runs = {
        name: parse([*each, "--output_dir", str(FOLDER / name)]) for name, each in flags.items()
    }
    # What both commands have, they have alike.
    of_both = {f.name for f in fields(CaptureArguments)} & {f.name for f in fields(known)}
    options = {name: getattr(known, name) for name in of_both} | {"overwrite": True}
    captured = capture(CaptureArguments(**options, out=shards, draws=DRAWS))
    reports = {}
    for name, (arguments, training) in runs.items():
        print(f"\n==> {name}", flush=True)
        reports[name] = distill.distill(arguments, training)
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
