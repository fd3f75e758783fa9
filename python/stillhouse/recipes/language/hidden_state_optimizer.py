"""What steps on the cache are worth: a language model of Debian's packages reads packages that it
has not seen, and text of four other kinds. The rate is the best of six on packages that are set
aside for that."""

from __future__ import annotations

import functools
import math
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from stillhouse import data
from stillhouse.methods.language import HiddenStateOptimizer
from stillhouse.recipes.language.package_lm import LENGTH, PackageText
from stillhouse.report import Report

RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
DOCUMENTS = 16  # of 128 tokens, of each kind
IN_DOMAIN = "packages"


def measure(report: Report, seed: int, lm: nn.Module, text: PackageText) -> list[dict[str, object]]:
    """Rows of the table, one a kind of text; a plot of the first seed."""
    blocks = [[token for line in block for token in line] for block in text.held_out]
    apart, held = blocks[::2], blocks[1::2]
    rate = min(RATES, key=lambda rate: _nats(lm, _documents(apart, seed), rate))
    rows, saved = [], {}
    for kind, ids in {IN_DOMAIN: held, **_others(text)}.items():
        documents = _documents(ids, seed)
        plain = _nats(lm, documents, 0.0)
        ratios = {each: math.exp(_nats(lm, documents, each) - plain) for each in RATES}
        saved[kind] = [100 * (1 - ratio) for ratio in ratios.values()]
        perplexities = {"perplexity": math.exp(plain), "its ratio": ratios[rate]}
        rows.append({"text": kind, "seed": seed, **perplexities, "rate": rate})
    if len(report.seeds) == 1:
        report.curve(
            "cache-optimisation",
            [math.log10(each) for each in RATES],
            saved,
            xlabel="log10 of the rate",
            ylabel="perplexity saved, %",
        )
    return rows


def claim(report: Report, rows: Sequence[dict[str, object]]) -> None:
    """The table, and the claims on ratios of perplexity."""
    report.table("steps on the cache", rows)
    inside = [row["its ratio"] for row in rows if row["text"] == IN_DOMAIN]
    ratios: dict[object, list[float]] = {}
    for row in rows:
        if row["text"] != IN_DOMAIN:
            ratios.setdefault(row["seed"], []).append(row["its ratio"])
    outside = [max(each) for each in ratios.values()]
    report.claim(
        "perplexity with steps on the cache / without, the worst of four kinds of other text",
        outside,
        0.98,
        relation="<=",
    )
    report.claim("the same, against that of packages", outside, inside, relation="<=")


@functools.cache
def _others(text: PackageText) -> dict[str, list[list[int]]]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:80]
    english, german = zip(*data.catalog_pairs("de")[::8], strict=True)
    return {
        "Python's documentation": [text.encode(each[:4000]) for each in data.stdlib_docs()],
        "Python's source": [text.encode(each.read_text("utf-8")[:3000]) for each in files],
        "messages, English": [text.encode("\n".join(english))],
        "messages, German": [text.encode("\n".join(german))],
    }


def _documents(texts: list[list[int]], seed: int) -> Tensor:
    """int64 [16, 128]: pieces of texts, drawn."""
    pieces = [
        ids[start : start + LENGTH]
        for ids in texts
        for start in range(0, len(ids) - LENGTH + 1, LENGTH)
    ]
    return torch.tensor(random.Random(seed).sample(pieces, DOCUMENTS))


def _nats(lm: nn.Module, documents: Tensor, rate: float) -> float:
    return HiddenStateOptimizer(lm, lr=rate).score(documents)[:, 1:].mean().item()
