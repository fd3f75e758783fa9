"""`stillhouse speculate`: how much faster a language model writes with drafts, and how it fares.

Plain `generate` and `methods.speculative.generate` with each drafter continue the same prompts in
turns, on text that repeats itself, on code and on prose. At temperature 0 all write the same text;
what differs is how many forwards of the target that takes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from stillhouse.errors import UsageError
from stillhouse.ops.tree_reference import MODES, MOST_NODES
from stillhouse.recipes.speculate_job import ALONE, PLAIN, Job, named
from stillhouse.report import Report

DRAFTERS = ("aded", "ngram", "fspad")
# What `make distill` leaves of smollm2, and so the draft model where it is there.
STUDENT = Path("runs/smollm2-6-blocks/student")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class SpeculateArguments:
    """As the flags of the command line."""

    target: str = "smollm2"
    draft: str | None = None
    drafter: str | None = None
    head: str | None = None
    corpus: str = "stdlib-docs"
    prompts: str | None = None
    out: str = "runs/speculate"
    dtype: str = "float32"
    max_new_tokens: int = 128
    prompt_tokens: int = 96
    draft_length: int = 5
    max_nodes: int = 32
    temperature: float = 0.0
    top_p: float | None = None
    mode: str = "auto"
    repeats: int = 5
    seed: int = 0


def speculate(arguments: SpeculateArguments) -> Report:
    """Write, measure, report. Returns the report, which is also on disk.

    Raises UsageError for flags, ValueError and FileNotFoundError for models and texts that do not
    fit.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    check(arguments)
    if arguments.draft is None and arguments.drafter is None:
        arguments.drafter = "aded"
        if arguments.target == "smollm2" and STUDENT.is_dir():
            arguments.draft = str(STUDENT)
    job = Job(arguments)
    job.run()
    report = Report("speculate", arguments.out)
    _fill(report, job)
    report.save()
    return report


def check(arguments: SpeculateArguments) -> None:
    """Raise UsageError for flags that are wrong whatever the models are."""
    least = {"max_new_tokens": 1, "prompt_tokens": 1, "draft_length": 1, "max_nodes": 1}
    for name, bound in (least | {"repeats": 1}).items():
        if getattr(arguments, name) < bound:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} must be at least {bound}, got {getattr(arguments, name)}")
    drafters = named(arguments)
    unknown = set(drafters) - set(DRAFTERS)
    if unknown:
        raise UsageError(f"--drafter must be one of {', '.join(DRAFTERS)}, got {min(unknown)!r}")
    if ("fspad" in drafters) != (arguments.head is not None):
        raise UsageError("--drafter fspad and --head, the folder of its draft head, go together")
    if arguments.dtype not in DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, got {arguments.dtype}")
    if arguments.max_nodes >= MOST_NODES:
        raise UsageError(f"--max-nodes must be below {MOST_NODES}, got {arguments.max_nodes}")
    if arguments.mode not in ("auto", *MODES):
        choices = ", ".join(("auto", *MODES))
        raise UsageError(f"--mode must be one of {choices}, got {arguments.mode}")
    if not arguments.temperature and arguments.mode not in ("auto", "greedy"):
        raise UsageError(f"--mode {arguments.mode} needs a --temperature above 0")
    if not 0 <= arguments.temperature < float("inf"):
        raise UsageError(f"--temperature must be a number >= 0, got {arguments.temperature}")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise UsageError(f"--top-p must be in (0, 1], got {arguments.top_p}")
    if Path(arguments.out).is_file():
        raise UsageError(f"--out {arguments.out} is a file: name a folder")


def _fill(report: Report, job: Job) -> None:
    rows, rates = [], {}
    for kind in job.prompts:
        plain = job.rate(PLAIN, kind)
        for name in (PLAIN, *job.drafters):
            found, rate = job.last(name, kind), job.rate(name, kind)
            rates.setdefault(kind, {})[name] = rate
            rows.append(
                {
                    "text": kind,
                    "drafter": name,
                    "tokens/s": rate,
                    "times plain": rate / plain,
                    "tokens a forward": found.tokens_per_round,
                    "accepted share": found.acceptance_rate,
                    "nodes a forward": found.nodes_per_round,
                    "ms a forward": found.round_milliseconds,
                    "ms a draft": found.draft_milliseconds,
                    "same text": found.same_text,
                }
            )
    report.table("speed", rows)
    report.value("tokens_per_second", rates)
    report.value("repeats", job.arguments.repeats)
    report.value("configuration", asdict(job.arguments))
    report.value("continued", job.continuations())
    drafted = [name for name in job.drafters if name != ALONE]
    histograms = {
        f"{name}, {kind}": job.last(name, kind).histogram
        for name in drafted
        for kind in job.prompts
    }
    counts = {label: list(each) for label, each in histograms.items()}
    shares = {label: _shares(each) for label, each in histograms.items()}
    label = "share of the forwards"
    report.curve("accepted", counts, shares, xlabel="accepted draft tokens", ylabel=label)
    kind = next(iter(job.prompts))
    traces = {name: job.last(name, kind).trace for name in (PLAIN, *drafted)}
    seconds = {name: [when for when, _ in trace] for name, trace in traces.items()}
    tokens = {name: [count for _, count in trace] for name, trace in traces.items()}
    report.curve("written", seconds, tokens, xlabel="seconds", ylabel=f"tokens, {kind} text")


def _shares(histogram: dict[int, int]) -> list[float]:
    total = sum(histogram.values())
    return [count / total for count in histogram.values()]
