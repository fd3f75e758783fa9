"""CodeGen2 on the standard library's source, scaled down: does a model trained on a mixture fill a
hole better from both of its sides than a causal one from the left, and what does it cost it from
left to right?

Documents are 16 symbols long, with a hole of 3. A model is an MLP that sees the 6 symbols on the
left of the next one and, while it fills a hole, the 6 behind that and how far it has come: it is
told where the mask stood, which a transformer of this size does not find out in minutes. Two from
the same start on the same documents: each as it is, or with probability 1/2 with its hole asked for
at the end. Of the paper's arms the prefix with bidirectional attention is left out: nothing here
attends.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from stillhouse.methods.language import CausalLM, Mixture, Sentinels, SpanCorruption
from stillhouse.progress import Progress
from stillhouse.recipes.language.byte_lm import VOCABULARY, ByteText
from stillhouse.report import Report
from stillhouse.train import supervised_rows
from stillhouse.train.examples import Example, collate

LENGTH, HOLE, NEAR = 16, 3, 6
BATCH, STEPS, HELD_OUT = 192, 2700, 3000
WORDS = Sentinels((VOCABULARY,), VOCABULARY + 1, VOCABULARY + 2, VOCABULARY + 3)
NOTHING = VOCABULARY + 4  # before the first token
CAUSAL, MIXTURE = "causal", "mixture"


class WindowLM(nn.Module):
    """Logits [N, 52] of the next token from the 13 that `_rows` gives."""

    def __init__(self, seed: int, width: int = 16, hidden: int = 256):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(NOTHING + 1, width)
            self.first = nn.Linear((2 * NEAR + 1) * width, hidden)
            self.second = nn.Linear(hidden, hidden)
            self.head = nn.Linear(hidden, NOTHING)

    def forward(self, contexts: Tensor) -> Tensor:
        x = self.first(self.embedding(contexts).flatten(1)).relu()
        return self.head(x + self.second(x).relu())


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    text = ByteText()
    rows, curves = [], {}
    for seed in report.within(budget, seeds):
        held = _held_out(text, seed)
        row: dict[str, float] = {"seed": seed}
        for name in (CAUSAL, MIXTURE):
            model = WindowLM(seed)
            losses = _train(model, text, name, seed)
            if len(report.seeds) == 1:
                curves[name] = losses
            with torch.no_grad():
                nats = {key: _nats(model, examples) for key, examples in held.items()}
            row |= {f"{name}, {key}": value for key, value in nats.items()}
        rows.append(row)
    report.table(
        "nats a token, held out",
        [
            {
                "tokens": key,
                CAUSAL: [row[f"{CAUSAL}, {key}"] for row in rows],
                MIXTURE: [row[f"{MIXTURE}, {key}"] for row in rows],
            }
            for key in held
        ],
    )
    report.curve("loss", range(10, STEPS + 1, 10), curves, ylabel="nats a target")
    report.claim(
        "middles with both sides, the mixture / with the left side, the causal model",
        [
            row[f"{MIXTURE}, middle, both sides"] / row[f"{CAUSAL}, middle, left side"]
            for row in rows
        ],
        0.9,
        relation="<=",
    )
    report.claim(
        "middles with the suffix of another document / with their own, the mixture",
        [
            row[f"{MIXTURE}, middle, wrong suffix"] / row[f"{MIXTURE}, middle, both sides"]
            for row in rows
        ],
        1.1,
    )
    cost = [row[f"{MIXTURE}, whole"] / row[f"{CAUSAL}, whole"] - 1 for row in rows]
    report.table("what it costs from left to right, share", [{"cost": cost}])


def _documents(
    text: ByteText, count: int, low: int, high: int, generator: torch.Generator
) -> np.ndarray:
    start = torch.randint(low, high - LENGTH, (count,), generator=generator)
    return text.symbols[start[:, None] + torch.arange(LENGTH)].numpy().astype(np.int32)


def _corruption() -> SpanCorruption:
    share = HOLE / LENGTH
    return SpanCorruption(WORDS, ratio=(share, share), mean_span=(HOLE, HOLE))


def _held_out(text: ByteText, seed: int) -> dict[str, list[Example]]:
    """The same middles in three ways to ask for them, and whole documents."""
    generator = torch.Generator().manual_seed(1000 + seed)
    documents = _documents(text, HELD_OUT, text.split, len(text.symbols), generator)
    others = _documents(text, HELD_OUT, text.split, len(text.symbols), generator)
    left, both, wrong = [], [], []
    for document, other in zip(documents, others, strict=True):
        example = _corruption()(document, generator=generator)
        ids, end = example.input_ids, int(example.prefix_length) - 2
        hole = int(np.flatnonzero(ids == WORDS.masks[0])[0])
        asked = example.loss_mask & (ids != WORDS.end_of_span)
        middle = np.zeros(LENGTH, dtype=bool)
        middle[hole : hole + int(asked.sum())] = True
        if hole == 0:  # of a document's first token nothing is seen on the left
            asked[np.flatnonzero(asked)[0]] = False
        left.append(Example(document, middle))
        both.append(Example(ids, asked))
        ids = ids.copy()
        ids[hole + 1 : end] = other[: end - hole - 1]
        wrong.append(Example(ids, asked))
    return {
        "middle, left side": left,
        "middle, both sides": both,
        "middle, wrong suffix": wrong,
        "whole": [CausalLM()(document) for document in documents],
    }


def _rows(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """What is seen before each target [N, 13], and the targets [N]: the 6 tokens on its left and,
    where a hole is being filled, the 6 behind it and how many are filled in; on the left are then
    these and what is before the hole."""
    batch = collate(examples)
    ids, index = batch["input_ids"], supervised_rows(batch["labels"])
    length, place = ids.shape[1], torch.arange(ids.shape[1])
    near = pad(ids, (NEAR, 0), value=NOTHING).unfold(1, NEAR, 1)  # [:, j]: the 6 before j
    is_mask = ids == WORDS.masks[0]
    asked = is_mask.cumsum(1) == 2
    rows, hole, opened = torch.arange(len(ids)), is_mask.int().argmax(1), asked.int().argmax(1)
    filled = ids.gather(1, (opened[:, None] + 1 + place).clamp(max=length - 1))
    whole = torch.cat([near[rows, hole], filled], 1).unfold(1, NEAR, 1)
    at = (place - opened[:, None]).clamp(min=0)
    left = torch.where(asked[..., None], whole[rows[:, None], at], near[:, 1 : length + 1])
    # Behind the text stands what is asked for: it is not to be seen from within it.
    text = ids.masked_fill((ids == WORDS.separator).cumsum(1) > 0, NOTHING)
    behind = pad(text, (0, NEAR), value=NOTHING).unfold(1, NEAR, 1)  # [:, j]: the 6 from j on
    right = behind[rows, hole + 1][:, None].expand(-1, length, -1)
    of_hole = torch.cat([right, at[..., None].clamp(max=LENGTH)], -1)
    contexts = torch.cat([left, torch.where(asked[..., None], of_hole, NOTHING)], -1)
    return contexts.flatten(0, 1)[index.row], index.target


def _nats(model: WindowLM, examples: Sequence[Example]) -> float:
    """Among symbols of text: that a hole ends is another question, which nobody asks of the left
    side."""
    contexts, targets = _rows(examples)
    return cross_entropy(model(contexts)[:, :VOCABULARY], targets).item()


def _train(model: WindowLM, text: ByteText, name: str, seed: int) -> list[float]:
    """The loss of every tenth step."""
    transform = CausalLM()
    if name == MIXTURE:
        transform = Mixture([(0.5, transform), (0.5, _corruption())])
    generator = torch.Generator().manual_seed(seed)
    documents = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    losses, said = [], Progress("steps")
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / STEPS) + 1e-5
        some = _documents(text, BATCH, 0, text.split, documents)
        contexts, targets = _rows([transform(each, generator=generator) for each in some])
        loss = cross_entropy(model(contexts), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        said(name, step + 1, STEPS)
        if (step + 1) % 10 == 0:
            losses.append(loss.item())
    return losses
