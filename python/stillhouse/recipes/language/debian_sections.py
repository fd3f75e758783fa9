"""From what a package's summary says to its section: a short answer to a longer question, from
Debian's index, in subwords of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse import data

PAD, START, END, SEPARATOR = range(4)
SPECIAL = ("<pad>", "<s>", "</s>", "<sep>")
VOCABULARY = 1024
MAX_SOURCE = 24
TEST = 2000


@dataclass(frozen=True)
class Pairs:
    """Summaries and sections as token ids; a section ends with `END`."""

    source: list[Tensor]
    target: list[Tensor]

    def __len__(self) -> int:
        return len(self.source)

    def part(self, rows: slice | Tensor) -> "Pairs":
        numbers = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        return Pairs([self.source[i] for i in numbers], [self.target[i] for i in numbers])

    @property
    def prompts(self) -> list[Tensor]:
        """The summaries as a decoder-only model asks: with the separator behind them."""
        return [torch.cat([each, each.new_tensor([SEPARATOR])]) for each in self.source]


class Sections:
    """59,900 summaries, each once, with the section of the first package that has it.

    A fixed 2,000 of them are `test`; `train(count, seed)` draws from the rest. Subwords are learned
    on the others' summaries and on the names of the sections.
    """

    def __init__(self) -> None:
        known: dict[str, str] = {}
        for package in data.debian_packages():
            if package.summary:
                known.setdefault(package.summary.lower(), package.section.split("/")[-1])
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
        texts = list(known.items())
        texts = [texts[number] for number in order]
        self.tokenizer = _tokenizer([summary for summary, _ in texts[TEST:]], known.values())
        summaries, sections = zip(*texts, strict=True)
        self.all = Pairs(
            [torch.tensor(ids[:MAX_SOURCE]) for ids in self._encode(summaries)],
            [torch.tensor([*ids, END]) for ids in self._encode(sections)],
        )
        self.longest = max(map(len, self.all.target))
        self.test = self.all.part(slice(TEST))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        # A text of characters that training has not seen has no token: the separator stands for it.
        return [each.ids or [SEPARATOR] for each in self.tokenizer.encode_batch(list(texts))]

    def train(self, count: int, seed: int) -> Pairs:
        """Of the pairs that are not in the test set."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(self.all) - TEST, generator=generator)[:count]
        return self.all.part(rows + TEST)


def _tokenizer(summaries: Sequence[str], sections: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator([*summaries, *sections], trainer)
    return tokenizer
