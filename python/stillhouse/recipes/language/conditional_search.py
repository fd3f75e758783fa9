"""Descriptions of exactly n tokens for the names of packages: a beam that looks ahead with a
classifier of lengths, against one that is cut off. And what empty descriptions would need to be the
likeliest ones."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.methods.language import (
    LengthAttribute,
    conditional_beam_search,
    output_entropy,
    train_prefix_classifier,
)
from stillhouse.recipes.language.package_lm import END, VOCABULARY, PackageText
from stillhouse.report import Report
from stillhouse.train import Responses, rollout

PROMPTS, LENGTHS, BEAM = 50, (4, 6, 8), 5
SAMPLES, LONGEST = 3000, 30
CLASSES = 25  # 0 to 23 tokens to come, or more
ENTROPIES = 24  # prompts, with 24 responses each


def measure(report: Report, seed: int, lm: nn.Module, text: PackageText) -> dict[str, Any]:
    """A row of the table; that of empty texts, with a plot, of the first seed."""
    drawn = random.Random(seed)
    names = drawn.sample(text.names(text.lines), SAMPLES)
    held = text.names([line for block in text.held_out for line in block])
    prompts = drawn.sample(held, PROMPTS)
    classifier = _classifier(lm, names, seed)
    wins, own_end, gained = [], [], []
    for prompt in prompts:
        step = _step(lm, prompt)
        for n in LENGTHS:
            found = _looking_ahead(step, classifier, n)
            cut, ranked = _cut(step, n), _ending(step, n)
            wins.append(found > cut)
            own_end.append((found > ranked + 1e-9) - (found < ranked - 1e-9))
            gained.append(found - cut)
    if len(report.seeds) == 1:
        _empty(report, lm, drawn.sample(held, ENTROPIES), seed)
    return {
        "seed": seed,
        "better than a cut beam, share": sum(wins) / len(wins),
        "nats better": sum(max(each, -50.0) for each in gained) / len(gained),
        "better than a beam that ranks by its end": own_end.count(1) / len(own_end),
        "worse than that": own_end.count(-1) / len(own_end),
    }


def claim(report: Report, rows: Sequence[dict[str, Any]]) -> None:
    """The table, and the claim on shares."""
    report.table("texts of 4, 6 and 8 tokens", rows)
    report.claim(
        "exact length: share of texts that are likelier than a cut beam's",
        [row["better than a cut beam, share"] for row in rows],
        0.7,
    )


def _classifier(lm: nn.Module, names: list[list[int]], seed: int) -> nn.Module:
    """Of how many tokens follow, from the model's own descriptions."""
    drawn = rollout(lm, names, max_new_tokens=LONGEST, seed=seed)
    batch = drawn.batch()
    hidden = torch.cat(
        [
            lm.model(input_ids=ids, attention_mask=mask).last_hidden_state
            for ids, mask in zip(
                batch["input_ids"].split(500), batch["attention_mask"].split(500), strict=True
            )
        ]
    )
    row, place, follow = _prefixes(drawn)
    return train_prefix_classifier(
        hidden[row, place - 1],
        drawn.ids[row, place],
        follow,
        vocabulary=VOCABULARY,
        classes=CLASSES,
        width=128,
        steps=1200,
        batch=512,
        seed=seed,
    )


def _prefixes(drawn: Responses) -> tuple[Tensor, Tensor, Tensor]:
    """Row and place of each token but the end, and the class of how many follow it: "or more" where
    the text was cut."""
    row, place = (drawn.mask & (drawn.ids != END)).nonzero().unbind(1)
    last = drawn.length - 1
    ended = drawn.ids.gather(1, last[:, None])[:, 0] == END
    follow = (last[row] - place - 1).clamp(max=CLASSES - 1)
    return row, place, follow.where(ended[row], CLASSES - 1)


def _step(lm: nn.Module, prompt: list[int]) -> Any:
    start = torch.tensor(prompt)[None]

    def step(ids: Tensor) -> tuple[Tensor, Tensor]:
        whole = torch.cat([start.expand(len(ids), -1), ids], 1)
        hidden = lm.model(input_ids=whole, use_cache=False).last_hidden_state[:, -1]
        return lm.lm_head(hidden), hidden

    return step


def _looking_ahead(step: Any, classifier: nn.Module, n: int) -> float:
    """log p of the text found, its end included; -inf where none ends at n."""
    attribute = LengthAttribute(classifier, n, eos=END)
    best = conditional_beam_search(
        step, attribute, beam=BEAM, max_length=n + 1, eos=END, expand=100
    )[0]
    return best.log_prob if best.finished else -math.inf


def _cut(step: Any, n: int) -> float:
    """The likeliest n tokens without an end that a beam finds, ended there."""

    def goes_on(ids: Tensor, tokens: Tensor, hidden: Any) -> Tensor:
        return (tokens != END).double()

    best = conditional_beam_search(step, goes_on, beam=BEAM, max_length=n, eos=END)[0]
    return best.log_prob + step(best.ids[None])[0].double().log_softmax(-1)[0, END].item()


def _ending(step: Any, n: int) -> float:
    """The same, but that the last beam is ranked with its end."""

    def is_over(ids: Tensor, tokens: Tensor, hidden: Any) -> Tensor:
        return ((tokens == END) == (ids.shape[1] == n)).double()

    best = conditional_beam_search(step, is_over, beam=BEAM, max_length=n + 1, eos=END)[0]
    return best.log_prob


def _empty(report: Report, lm: nn.Module, prompts: list[list[int]], seed: int) -> None:
    found = output_entropy(lm, prompts, samples=24, max_new_tokens=40, seed=seed)
    length = torch.tensor([len(prompt) for prompt in prompts])
    bits = -found.empty.log2()
    rows = []
    for name, some in (("short", length <= length.median()), ("long", length > length.median())):
        rows.append(
            {
                "names": name,
                "tokens": length[some].double().mean().item(),
                "entropy, bits": found.bits[some].mean().item(),
                "its standard error": found.stderr[some].mean().item(),
                "the likeliest drawn, bits": found.best_bits[some].mean().item(),
                "empty, bits": bits[some].mean().item(),
                "P(empty) above the threshold, share": (found.empty > found.threshold)[some]
                .double()
                .mean()
                .item(),
                "above the likeliest drawn, share": (bits < found.best_bits)[some]
                .double()
                .mean()
                .item(),
            }
        )
    report.table("empty descriptions", rows)
    report.curve(
        "empty",
        length.tolist(),
        {
            "entropy of the description": found.bits,
            "likeliest one drawn": found.best_bits,
            "empty": bits,
        },
        xlabel="tokens of the name",
        ylabel="bits",
        points=True,
    )
