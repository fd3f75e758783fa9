"""What a summary of the window before is worth, on the standard library's source.

A GPT-2 of 2 blocks of width 64 is trained for 200 steps on windows of 64 tokens (1,024 byte pairs);
then it takes 200 steps more on texts of 8 windows, without recurrence and with it. Perplexity on
excerpts of 513 tokens of files that no model was trained on.
"""

from __future__ import annotations

import copy
import functools
import math
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from stillhouse.methods.language.window_recurrence import WindowRecurrence
from stillhouse.progress import Progress
from stillhouse.recipes.language.byte_pairs import byte_pairs
from stillhouse.report import Report

WINDOW, LENGTH = 64, 513
VOCABULARY, CHARACTERS = 1024, 20_000  # of a file
STEPS, RATE = 200, 5e-3
READ = 2  # the depth of the states that are summed up
NAMES = ("windows alone", "with an overlap of 32", "with recurrence")


def measure(report: Report, seed: int) -> dict[str, float]:
    """Trains and measures with one seed: nats a token and perplexities, a row of the table; a plot
    of the first seed."""
    train, held = _documents()
    base = WindowRecurrence(_model(seed), READ, ())
    _fit(base, train, rows=32, length=WINDOW + 1, seed=3 * seed, name="windows")
    plain = copy.deepcopy(base)
    _fit(plain, train, rows=4, length=LENGTH, seed=3 * seed + 1, name="documents")
    recurrent = WindowRecurrence(base.lm, READ, seed=seed)
    _fit(recurrent, train, rows=4, length=LENGTH, seed=3 * seed + 1, name="recurrence")
    scores = (
        plain.score(held, window=WINDOW),
        plain.score(held, window=WINDOW, overlap=WINDOW // 2),
        recurrent.score(held, window=WINDOW),
    )
    losses = {name: each[:, 1:].mean().item() for name, each in zip(NAMES, scores, strict=True)}
    if len(report.seeds) == 1:
        # Of all windows but the first.
        by_place = [
            each[:, WINDOW + 1 :].unflatten(1, (-1, WINDOW)).mean((0, 1)) for each in scores
        ]
        report.curve(
            "recurrence",
            range(1, WINDOW + 1),
            {name: each.tolist() for name, each in zip(NAMES, by_place, strict=True)},
            xlabel="token of the window",
            ylabel="nats",
        )
    row = {"seed": seed} | losses
    row |= {f"perplexity, {name}": math.exp(each) for name, each in losses.items()}
    return row


def claim(report: Report, rows: Sequence[dict[str, float]]) -> None:
    """The table, and the claim on perplexity."""
    report.table("recurrence between windows, nats a token", rows)
    alone, _, recurrent = ([row[f"perplexity, {name}"] for row in rows] for name in NAMES)
    report.claim(
        "perplexity in windows of 64 with recurrence, against 0.99 of that without",
        recurrent,
        [0.99 * each for each in alone],
        relation="<=",
    )


@functools.cache
def _documents() -> tuple[list[Tensor], dict[str, Tensor]]:
    """Files to train on, int64 [n] each, and the batch of one excerpt of every tenth file."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = [
        each.read_bytes()[:CHARACTERS].decode(errors="ignore")
        for each in sorted(library.rglob("*.py"))
        if not {"test", "tests", "site-packages"} & {*each.relative_to(library).parts}
    ]
    core = byte_pairs((x[:4000] for n, x in enumerate(texts) if n % 10), VOCABULARY)
    ids = [torch.tensor(each.ids) for each in core.encode_batch(texts)]
    train = [x for n, x in enumerate(ids) if n % 10 and len(x) >= LENGTH]
    # From the middle, where files are less alike than at their beginnings.
    held = [x[(len(x) - LENGTH) // 2 :][:LENGTH] for x in ids[::10] if len(x) >= LENGTH]
    if len(train) < 100:
        raise FileNotFoundError(
            f"expected the standard library's source, found {len(train)} long files of it: this "
            "interpreter was installed without its .py files"
        )
    return train, _batch(torch.stack(held))


def _batch(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _model(seed: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=WINDOW,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=0.08,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def _fit(
    model: WindowRecurrence,
    documents: list[Tensor],
    *,
    rows: int,
    length: int,
    seed: int,
    name: str,
) -> None:
    """Adam on excerpts of `length` tokens; the rate falls linearly."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    said = Progress("steps")
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS) + 1e-5
        drawn = []
        for number in torch.randint(len(documents), (rows,), generator=generator).tolist():
            last = len(documents[number]) - length
            start = int(torch.randint(last + 1, (), generator=generator))
            drawn.append(documents[number][start : start + length])
        ids = torch.stack(drawn)
        if not model.attentions:
            # Windows without recurrence are texts of their own, and go through the model at once.
            ids = ids.unfold(1, WINDOW + 1, WINDOW).flatten(0, 1)
        # The activations of a model this small are kept.
        loss = model.loss(_batch(ids), window=WINDOW, bptt=4, checkpointing=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        said(name, step + 1, STEPS)
