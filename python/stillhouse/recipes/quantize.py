"""`stillhouse quantize`: a language model in, one with weights of two bits out, and what it cost.

The linear layers become dual-binary, by the largest weight (round to nearest) and by least squares;
the scales of the latter then learn from the original, once by plain distillation and once weighted
by entropies (DAD). The best of them is saved. What was done so far is kept in `unfinished`, so a
run that was stopped goes on.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillhouse.errors import UsageError
from stillhouse.recipes.distill_report import load_command
from stillhouse.recipes.quantize_job import ORIGINAL, Job
from stillhouse.report import Report, write_atomically

MODEL, UNFINISHED, SETTINGS = "model", "unfinished", "settings.json"
# What may differ between a run and its continuation.
FREE = ("out", "resume", "overwrite")


@dataclass
class QuantizeArguments:
    """As the flags of the command line; what `stillhouse distill` has as well means the same."""

    model: str = "smollm2"
    data: str = "stdlib-docs"
    out: str = "runs/quantize"
    group_size: int = 64
    steps: int = 40
    batch_size: int = 8
    max_length: int = 128
    learning_rate: float = 2e-2
    eval_data: str | None = None
    eval_share: float = 0.08
    eval_tokens: int = 8192
    seed: int = 0
    resume: bool = False
    overwrite: bool = False


def quantize(arguments: QuantizeArguments) -> Report:
    """Quantize, distil, measure, save. Returns the report, which is also on disk.

    Raises UsageError for flags and folders, ValueError and FileNotFoundError for models and data
    that do not fit.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    check(arguments)
    folder = Path(arguments.out)
    _check_folder(arguments, folder)
    job = Job(arguments, folder / UNFINISHED)
    _begin(arguments, folder)
    job.run()
    report = Report("quantize", folder)
    _fill(report, job)
    _save(job, folder / MODEL)
    report.value("model", str(folder / MODEL))
    report.value("load", load_command(folder / MODEL))
    files = (folder / MODEL).glob("*.safetensors")
    report.value("bytes_on_disk", sum(file.stat().st_size for file in files))
    report.save()
    shutil.rmtree(folder / UNFINISHED)
    print(f"model: {folder / MODEL}\nload it: {load_command(folder / MODEL)}")
    return report


def check(arguments: QuantizeArguments) -> None:
    """Raise UsageError for flags that are wrong whatever the model is."""
    least = {"group_size": 1, "steps": 0, "batch_size": 1, "max_length": 2, "eval_tokens": 1}
    for name, bound in least.items():
        if getattr(arguments, name) < bound:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} must be at least {bound}, got {getattr(arguments, name)}")
    if not 0 < arguments.learning_rate < float("inf"):
        raise UsageError(f"--learning-rate must be positive, got {arguments.learning_rate}")
    if arguments.eval_data is None and not 0 < arguments.eval_share < 1:
        raise UsageError(f"--eval-share must be between 0 and 1, got {arguments.eval_share}")
    if arguments.model.startswith(("fdb:", "experts:")):
        raise UsageError(
            f"--model {arguments.model}: name the dense model, a hub id, a folder, a .gguf file, "
            "smollm2 or layers:0,1,2@MODEL"
        )
    if arguments.model.startswith("layers:") and "@" not in arguments.model:
        raise UsageError(f"--model {arguments.model}: name whose layers, {arguments.model}@MODEL")


def _settings(arguments: QuantizeArguments) -> dict[str, Any]:
    return {name: value for name, value in asdict(arguments).items() if name not in FREE}


def _check_folder(arguments: QuantizeArguments, folder: Path) -> None:
    """Refuse to overwrite, or to go on with something else, before anything loads."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file: name a folder")
    model, settings = folder / MODEL, folder / UNFINISHED / SETTINGS
    if model.exists() and not (model / "config.json").is_file():
        raise UsageError(f"{model} is no model and would be replaced: name another --out")
    if arguments.resume:
        if settings.exists():
            before, now = json.loads(settings.read_text()), _settings(arguments)
            changed = [name for name in now if before.get(name) != now[name]]
            if changed:
                flag = changed[0].replace("_", "-")
                raise UsageError(
                    f"{folder} was begun with --{flag} {before.get(changed[0])}, not "
                    f"{now[changed[0]]}: leave it as it was, or start again with --overwrite"
                )
        elif model.exists():
            raise UsageError(f"{folder} is finished: there is nothing to --resume")
        else:
            print(f"nothing was begun in {folder} yet: starting at the first step")
        return
    if arguments.overwrite or not folder.exists() or not any(folder.iterdir()):
        return
    if settings.exists():
        raise UsageError(
            f"{folder} holds a run that was stopped: continue with --resume, start again with "
            "--overwrite, or name another --out"
        )
    held = MODEL if model.exists() else min(path.name for path in folder.iterdir())
    raise UsageError(f"{folder} already holds {held}: --overwrite starts again, or name another")


def _begin(arguments: QuantizeArguments, folder: Path) -> None:
    unfinished = folder / UNFINISHED
    if not arguments.resume:
        shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(_settings(arguments), indent=1)
    write_atomically(unfinished / SETTINGS, settings.encode())


def _fill(report: Report, job: Job) -> None:
    rates, written = job.speed()
    rows = []
    for name, found in job.measured.items():
        account = job.accounts[name]
        rows.append(
            {
                "weights": name,
                "perplexity": found["perplexity"],
                "KL to the original": found["forward_kl"],
                "bits of a linear weight": job.linear_bits(name),
                "bits of any weight": account.bits_per_weight,
                "MB": account.bytes / 1e6,
                "tokens/s": rates[name],
            }
        )
    report.table("held-out text", rows)
    report.value("best", job.best)
    report.value("perplexity", {name: each["perplexity"] for name, each in job.measured.items()})
    report.value("held_out_tokens", job.measured[ORIGINAL]["tokens"])
    report.value("tokens_per_second", rates)
    report.value("generated_tokens", written)
    report.value("macs_per_token", job.accounts[ORIGINAL].macs)
    report.value("configuration", asdict(job.arguments))
    shares = {name: [layer.relative_error for layer in each] for name, each in job.layers.items()}
    counts = {name: range(1, len(each) + 1) for name, each in shares.items()}
    label = "squared error of the weights, as a share of their squares"
    report.curve("error", counts, shares, xlabel="linear layer", ylabel=label)
    if not job.history:
        return
    steps = {name: [row["step"] for row in rows] for name, rows in job.history.items()}
    for key, label in (("acceptance", "shared mass with the original"), ("loss", "loss, nats")):
        curves = {name: [row[key] for row in rows] for name, rows in job.history.items()}
        report.curve(key, steps, curves, ylabel=label)


def _save(job: Job, folder: Path) -> None:
    """The best model with its tokenizer, whole or not at all."""
    from stillhouse.methods.compression import save_fdb

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    save_fdb(job.models[job.best], partial)
    job.tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
