"""ADED on a small language model of Python source: how many drafted tokens does it keep a round,
and what are the corpus, the updates and the search worth?

Target: a Llama of 2 blocks of width 64, trained for seconds on the standard library (1,024 byte
pairs). It writes 320 tokens behind each of 4 held-out prompts of 32, with a table of its own for
each: counted in the training files or empty, adapted to the text or not. Greedy, as in the paper,
where a small model's text repeats itself, and sampled, where it hardly does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from stillhouse.methods.speculative import (
    BeamDrafter,
    Drafter,
    GenerationStats,
    MCTSDrafter,
    TrigramTable,
    generate,
)
from stillhouse.recipes.speculative.source_lm import SourceText, source_lm
from stillhouse.report import Report

PROMPTS, PROMPT, TOKENS = 4, 32, 320
GREEDY, SAMPLED = 0.0, 0.7  # temperatures
LATE = 200  # tokens after which the adapted table has seen enough
LATE_KEPT = f"kept after {LATE} tokens"
BIN = 40
NOTHING, CORPUS, UPDATES = "neither", "corpus", "updates"
BOTH, BEAM = "corpus and updates", "the same, beam search"


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    text = SourceText()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        empty, corpus = Path(folder, "empty"), Path(folder, "corpus")
        TrigramTable().save(empty)
        TrigramTable().build(text.texts).save(corpus)
        makers = {
            NOTHING: lambda: MCTSDrafter(TrigramTable.load(empty), adapt=False),
            CORPUS: lambda: MCTSDrafter(TrigramTable.load(corpus), adapt=False),
            UPDATES: lambda: MCTSDrafter(TrigramTable.load(empty)),
            BOTH: lambda: MCTSDrafter(TrigramTable.load(corpus)),
            BEAM: lambda: BeamDrafter(TrigramTable.load(corpus)),
        }
        for seed in report.within(budget, seeds):
            rows += measure(report, text, makers, seed)
    report.table("draft tokens kept a round", rows)
    _claims(report, rows)


def measure(
    report: Report, text: SourceText, makers: dict[str, Callable[[], Drafter]], seed: int
) -> list[dict]:
    """A row for each drafter and temperature; plots of the first seed."""
    target = source_lm(text, seed)
    found = {
        (name, temperature): write(target, text, make, seed, temperature)
        for temperature in (GREEDY, SAMPLED)
        for name, make in makers.items()
    }
    if len(report.seeds) == 1:
        for temperature, plot in ((GREEDY, "greedy"), (SAMPLED, "sampled")):
            report.curve(
                plot,
                list(range(BIN // 2, TOKENS, BIN)),
                {name: kept_by_place(found[name, temperature]) for name in makers},
                xlabel="tokens written",
                ylabel="draft tokens kept a round",
            )
    return [
        {
            "table": name,
            "temperature": temperature,
            "seed": seed,
            "kept": stats.tokens_per_round - 1,
            LATE_KEPT: kept_after(stats, LATE),
            "calls": stats.calls,
            "nodes a round": stats.nodes / stats.rounds,
            "us a draft": 1e6 * stats.draft_seconds / stats.rounds,
        }
        for (name, temperature), stats in found.items()
    ]


def write(
    target: nn.Module,
    text: SourceText,
    make: Callable[[], Drafter],
    seed: int,
    temperature: float,
) -> GenerationStats:
    """Text behind the prompts, every draft verified in full."""
    prompts = [each[:PROMPT] for each in text.held_out if len(each) > PROMPT][:PROMPTS]
    _, stats = generate(
        target,
        [make() for _ in prompts],
        prompts,
        max_new_tokens=TOKENS,
        temperature=temperature,
        seed=seed,
        eos_token_id=(),
        max_nodes=63,
        adaptive=False,
    )
    return stats


def kept_after(stats: GenerationStats, start: int, end: int = TOKENS) -> float:
    """Draft tokens kept, on average, in rounds that begin at start or later and before end."""
    counts = []
    for rounds in stats.accepted:
        place = 0
        for accepted in rounds:
            if start <= place < end:
                counts.append(accepted)
            place += accepted + 1
    return sum(counts) / len(counts) if counts else 0.0


def kept_by_place(stats: GenerationStats) -> list[float]:
    return [kept_after(stats, start, start + BIN) for start in range(0, TOKENS, BIN)]


def _claims(report: Report, rows: list[dict]) -> None:
    def of(name: str, temperature: float, key: str = LATE_KEPT) -> list[float]:
        wanted = (name, temperature)
        return [row[key] for row in rows if (row["table"], row["temperature"]) == wanted]

    for temperature, how in ((GREEDY, "greedy"), (SAMPLED, "sampled")):
        report.claim(
            f"draft tokens kept after {LATE} tokens, corpus and updates against corpus, {how}",
            of(BOTH, temperature),
            of(CORPUS, temperature),
        )
    report.claim(
        f"draft tokens kept after {LATE} tokens without any corpus, greedy",
        of(UPDATES, GREEDY),
        1.0,
    )
    report.claim(
        "draft tokens kept by a table that knows nothing, greedy",
        of(NOTHING, GREEDY, "kept"),
        0.0,
        relation="<=",
    )
