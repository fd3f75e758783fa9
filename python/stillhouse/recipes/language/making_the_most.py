"""Making the most of a model, scaled down to five small experiments: recurrence between windows;
steps on the cache, conditional search and the odds of an empty text with a language model of
Debian's packages; translation in one pass by a model of masked messages. Each is a file of its own
beside this one.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.recipes.language import (
    conditional_search,
    hidden_state_optimizer,
    unrolled_denoiser,
    window_recurrence,
)
from stillhouse.recipes.language.package_lm import PackageText, package_lm
from stillhouse.report import Report


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    text = PackageText()
    recurrence, cache, denoiser, search = [], [], [], []
    for seed in report.within(budget, seeds):
        lm = package_lm(text, seed)
        cache += hidden_state_optimizer.measure(report, seed, lm, text)
        search.append(conditional_search.measure(report, seed, lm, text))
        recurrence.append(window_recurrence.measure(report, seed))
        denoiser += unrolled_denoiser.measure(report, seed)
    hidden_state_optimizer.claim(report, cache)
    conditional_search.claim(report, search)
    window_recurrence.claim(report, recurrence)
    unrolled_denoiser.claim(report, denoiser)
