"""A causal language model that is trained in half a minute: the names of Debian's packages, each
with its description in a line."""

from __future__ import annotations

import torch
from torch import nn

from stillhouse import data
from stillhouse.recipes.language.byte_pairs import byte_pairs
from stillhouse.recipes.language.small_lm import small_llama, train_on_windows

VOCABULARY = 1024
END = 0  # of a package's line
BLOCK = 50  # packages that are neighbours in the index
BATCH, LENGTH, STEPS, RATE = 12, 128, 500, 6e-3


class PackageText:
    """Lines `name: summary` of packages in the order of their names, as byte-pair tokens: those to
    train on, and every tenth block of 50, held out, which were not seen."""

    def __init__(self) -> None:
        lines = [f"{each.name}: {each.summary}" for each in data.debian_packages()]
        blocks = [lines[start : start + BLOCK] for start in range(0, len(lines), BLOCK)]
        to_train = [line for number, block in enumerate(blocks) if number % 10 for line in block]
        self.tokenizer = byte_pairs(to_train[::3], VOCABULARY, special=["<|end|>"])
        self.lines = self._encode(to_train)
        self.held_out = [self._encode(block) for block in blocks[::10]]

    def encode(self, text: str) -> list[int]:
        """Tokens of any text, without an end."""
        return self.tokenizer.encode(text).ids

    def names(self, lines: list[list[int]]) -> list[list[int]]:
        """The prompts `name:` of lines, those of at most 16 tokens."""
        colon = self.tokenizer.token_to_id(":")
        cut = [line[: line.index(colon) + 1] for line in lines if colon in line]
        return [name for name in cut if len(name) <= 16]

    def _encode(self, lines: list[str]) -> list[list[int]]:
        return [[*each.ids, END] for each in self.tokenizer.encode_batch(lines)]


def package_lm(text: PackageText, seed: int) -> nn.Module:
    """A Llama of 4 blocks of width 64, after 500 steps of AdamW on 12 windows of 128 tokens, each
    from the start of a line; its weights are frozen."""
    stream = torch.tensor([token for line in text.lines for token in line])
    starts = torch.tensor([0, *map(len, text.lines)]).cumsum(0)
    starts = starts[starts < len(stream) - LENGTH]
    lm = small_llama(VOCABULARY, 4, LENGTH, seed=seed, end=END)
    options = dict(length=LENGTH, batch=BATCH, steps=STEPS, rate=RATE, seed=seed)
    return train_on_windows(lm, stream, starts=starts, **options)
