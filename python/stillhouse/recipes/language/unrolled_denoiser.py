"""Translating short messages of installed programs from English to German, all tokens at once.

A small BERT is trained on masked messages of both languages; a translator that begins as two copies
of it, and one that begins with random weights, take the same steps of SUNDAE. On 300 messages that
none of them saw: loss, tokens in common with the translation (F1), exact matches, after one step of
decoding and after eight.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from stillhouse import data
from stillhouse.methods.language.masked_text import rare_word_masking
from stillhouse.methods.language.unrolled_denoiser import UnrolledDenoiser, seq2seq_from_mlm
from stillhouse.progress import Progress
from stillhouse.recipes.language.byte_pairs import byte_pairs
from stillhouse.report import Report
from stillhouse.train.rows import IGNORED

VOCABULARY, PAD, MASK = 1024, 0, 1
SOURCE, TARGET = 12, 8  # most tokens
WIDTH, ROWS, TEST = 64, 32, 300
MASKED_STEPS, STEPS, RATE = 500, 250, 4e-3
START = {"masked LM": True, "random weights": False}


def measure(report: Report, seed: int) -> list[dict[str, object]]:
    """Trains and measures with one seed: rows of the table; a plot of the first seed."""
    text = _Messages(seed)
    mlm, untrained = _masked_lm(seed), _masked_lm(seed)
    _train_masked(mlm, text, seed)
    rows, traces = [], {}
    for name, trained in START.items():
        pair = seq2seq_from_mlm(mlm if trained else untrained)
        model = UnrolledDenoiser(*pair, max_length=TARGET)
        traces[name] = _train(model, text, name, seed)
        rows += [{"seed": seed, "start": name} | each for each in _measure(model, text, seed)]
    if len(report.seeds) == 1:
        report.curve(
            "translation", range(10, STEPS + 1, 10), traces, ylabel="loss, nats, of ten steps"
        )
    return rows


def claim(report: Report, rows: Sequence[dict[str, object]]) -> None:
    """The table: what is measured is reported, and nothing is claimed."""
    report.table("translation in one pass", rows)


class _Messages:
    """Pairs of catalogs with at most 12 and 8 byte-pair tokens, 300 of them held out, and the
    messages of both languages that the masked model reads."""

    def __init__(self, seed: int):
        pairs = data.catalog_pairs("de")
        core = byte_pairs(
            (side for pair in pairs[::3] for side in pair),
            VOCABULARY,
            special=("<pad>", "<mask>"),
            lowercase=True,
        )
        sides = [core.encode_batch([pair[k] for pair in pairs]) for k in range(2)]
        ids = [(tuple(a.ids), tuple(b.ids)) for a, b in zip(*sides, strict=True)]
        short = sorted({x for x in ids if 2 <= len(x[0]) <= SOURCE and 2 <= len(x[1]) <= TARGET})
        random.Random(seed).shuffle(short)
        self.test, self.train = short[:TEST], short[TEST:]
        held = {side for pair in self.test for side in pair}
        # Neither side of a held-out pair may be among what is trained on.
        self.train = [pair for pair in self.train if not held & {*pair}]
        self.single = [x[:SOURCE] for pair in ids for x in pair if len(x) > 1 and x not in held]
        self.counts = torch.bincount(
            torch.tensor([token for x in self.single for token in x]), minlength=VOCABULARY
        )


def _masked_lm(seed: int) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=3 * WIDTH,
        max_position_embeddings=SOURCE,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return BertForMaskedLM(config)


def _padded(rows: Sequence[Sequence[int]], value: int = PAD) -> Tensor:
    return pad_sequence([torch.tensor(x) for x in rows], batch_first=True, padding_value=value)


def _batch(pairs: Sequence[tuple]) -> dict[str, Tensor]:
    source = _padded([x for x, _ in pairs])
    labels = _padded([y for _, y in pairs], IGNORED)
    return {"input_ids": source, "attention_mask": (source != PAD).long(), "labels": labels}


def _drawn(items: Sequence[Any], count: int, generator: torch.Generator) -> list[Any]:
    return [items[i] for i in torch.randint(len(items), (count,), generator=generator).tolist()]


def _steps(name: str, groups: list[dict], steps: int) -> Any:
    """Yields Adam's optimisers of each step; the rate rises for 20 steps and falls linearly."""
    optimizer, said = torch.optim.Adam(groups, lr=RATE), Progress("steps")
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min((step + 1) / 20, 1 - step / steps)
        optimizer.zero_grad()
        yield
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        said(name, step + 1, steps)


def _train_masked(mlm: nn.Module, text: _Messages, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in _steps("masked LM", [{"params": list(mlm.parameters())}], MASKED_STEPS):
        ids = _padded(_drawn(text.single, 2 * ROWS, generator))
        new, masked = rare_word_masking(
            ids, text.counts, mask_id=MASK, special_ids=(PAD,), prop=0.2, generator=generator
        )
        states = mlm.bert(input_ids=new, attention_mask=(ids != PAD).long()).last_hidden_state
        cross_entropy(mlm.cls(states[masked]), ids[masked]).backward()


def _train(model: UnrolledDenoiser, text: _Messages, name: str, seed: int) -> list[float]:
    """Losses, means of ten steps. The gates, which begin at 0, take steps ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    gates = [each.gate for each in model.decoder.cross]
    others = [each for each in model.parameters() if all(each is not gate for gate in gates)]
    groups = [{"params": others}, {"params": gates, "lr": 10 * RATE}]
    losses = []
    for _ in _steps(name, groups, STEPS):
        loss = model.loss(_batch(_drawn(text.train, ROWS, generator)), generator=generator)["loss"]
        loss.backward()
        losses.append(loss.item())
    return torch.tensor(losses).view(-1, 10).mean(1).tolist()


def _measure(model: UnrolledDenoiser, text: _Messages, seed: int) -> list[dict[str, object]]:
    """One row for each number of steps."""
    batch, rows = _batch(text.test), []
    with torch.no_grad():
        parts = model.loss(batch, generator=torch.Generator().manual_seed(seed))
    for steps in (1, 8):
        generator = torch.Generator().manual_seed(seed)
        said, _ = model.generate(batch, steps=steps, lengths=4, generator=generator)
        pairs = [(x.tolist(), list(y)) for x, (_, y) in zip(said, text.test, strict=True)]
        rows.append(
            {
                "nats a token": (parts["unroll_1"] + parts["unroll_2"]).item() / 2,
                "steps": steps,
                "F1": sum(_f1(*pair) for pair in pairs) / TEST,
                "exact": sum(x == y for x, y in pairs) / TEST,
            }
        )
    return rows


def _f1(said: list[int], wanted: list[int]) -> float:
    common = sum(min(said.count(token), wanted.count(token)) for token in set(wanted))
    return 2 * common / (len(said) + len(wanted))
