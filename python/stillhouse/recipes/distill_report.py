"""What `stillhouse distill` leaves behind: numbers, tables, a plot, two generations."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from pathlib import Path

import torch

from stillhouse.recipes.distill_job import Job, Run
from stillhouse.report import Report
from stillhouse.train import mixtures, quantized
from stillhouse.train.models import load_model


def fill(
    report: Report, job: Job, runs: list[Run], untouched: dict[str, float], folder: Path
) -> None:
    """Everything that was measured, as values, tables and a plot."""
    student, controls = runs[0], runs[1:]
    rows = [run.row() for run in runs]
    teacher = {"perplexity": student.metrics.get("reference_perplexity")}
    start = {name: None for name in rows[0]} | {
        "model": "untouched student",
        "perplexity": untouched.get("perplexity"),
        "KL to teacher": untouched.get("forward_kl"),
        "acceptance": untouched.get("acceptance"),
    }
    table = [start, *rows]
    if teacher["perplexity"] is not None:
        table.insert(0, {name: None for name in start} | {"model": "teacher"} | teacher)
    report.table("held-out text", table)

    names = ("student", "control", "control_equal_seconds")
    perplexity = {"teacher": teacher["perplexity"], "untouched": untouched.get("perplexity")}
    perplexity |= {name: None for name in names}
    perplexity |= {name: row["perplexity"] for name, row in zip(names, rows, strict=False)}
    report.value("perplexity", perplexity)
    report.value("tokens", {n: row["tokens"] for n, row in zip(names, rows, strict=False)})
    report.value("steps", {n: row["steps"] for n, row in zip(names, rows, strict=False)})
    report.value("kl_to_teacher", rows[0]["KL to teacher"])
    report.value("acceptance", rows[0]["acceptance"])
    report.value("seconds", student.seconds)
    report.value("tokens_per_second", rows[0]["tokens/s"])
    report.table(
        f"where the time of {student.name} went",
        [
            {"part": part, "seconds": spent, "share": spent / max(student.seconds["total"], 1e-9)}
            for part, spent in student.seconds.items()
        ],
    )
    for control in controls if job.eval_set else []:
        report.claim(
            f"perplexity over that of {control.name}",
            student.metrics["perplexity"] / control.metrics["perplexity"],
            1.0,
            seeds=[job.training.seed],
            relation="<=",
        )
    report.curve(
        "loss",
        {run.name: [entry["step"] for entry in run.history] for run in runs},
        {run.name: [entry["loss"] for entry in run.history] for run in runs},
        ylabel="loss (nats a token)",
    )
    report.value("processes", job.training.world_size)
    report.value("engine", student.engine)
    report.value("configuration", _configuration(job))
    report.value("model", str(folder))
    report.value("load", load_command(folder))


def generations(job: Job, folder: Path) -> list[dict[str, str]]:
    """How the saved student continues two held-out texts, greedily."""
    model = load_model(str(folder))
    result = []
    for example in (job.eval_set or job.train_set).examples[:2]:
        masked = int(example.loss_mask.argmax())
        # A conversation's prompt is what is masked; running text has none.
        prompt = example.input_ids[: masked or max(1, min(24, len(example.input_ids) // 2))]
        ids = torch.tensor(prompt[None].astype("int64"))
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=job.tokenizer.pad_token_id,
        )[0, len(prompt) :]
        texts = {"prompt": job.tokenizer.decode(prompt), "student": job.tokenizer.decode(output)}
        print(f"\n>>> {texts['prompt']}\n{texts['student']}")
        result.append(texts)
    return result


def _configuration(job: Job) -> dict[str, object]:
    """Our arguments, and those of the training that differ from the library's defaults."""
    plain = job.training.to_sanitized_dict()  # no tokens, nothing that JSON does not know
    changed = {}
    for field in fields(job.training):
        value = getattr(job.training, field.name)
        untouched = field.default is MISSING or value == field.default or value in (None, [], {})
        if not untouched and field.name in plain:
            changed[field.name] = plain[field.name]
    return asdict(job.arguments) | {"training": changed}


def load_command(folder: Path) -> str:
    """A shell command that loads the student and lets it write."""
    if mixtures.is_marked(folder) or quantized.is_marked(folder):
        return (
            'python -c "from stillhouse.train.models import load_model; '
            f'print(load_model({str(folder)!r}))"'
        )
    return (
        "python -c \"from transformers import pipeline; print(pipeline('text-generation', "
        f"{str(folder)!r})('The for statement')[0]['generated_text'])\""
    )
