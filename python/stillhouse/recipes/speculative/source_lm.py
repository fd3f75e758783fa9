"""A causal language model that is trained in seconds: Python's own standard library as byte pairs,
the test bed of drafters that learn from text."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn

from stillhouse.recipes.language.byte_pairs import byte_pairs
from stillhouse.recipes.language.small_lm import small_llama, train_on_windows

VOCABULARY, CHARACTERS = 1024, 20_000  # of a file
BATCH, LENGTH, STEPS, RATE = 8, 192, 300, 6e-3
POSITIONS = 512


class SourceText:
    """The beginnings of the library's files, as tokens: those to train on, and every eighth, which
    is held out."""

    def __init__(self) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        if len(files) < 50:
            raise FileNotFoundError(
                f"expected the standard library's source, found {len(files)} files: this "
                "interpreter was installed without its .py files"
            )
        texts = [file.read_text(errors="replace")[:CHARACTERS] for file in files]
        to_train = [text for number, text in enumerate(texts) if number % 8]
        self.tokenizer = byte_pairs(to_train[::2], VOCABULARY)
        self.texts = self._encode(to_train)
        self.held_out = self._encode(texts[::8])

    def _encode(self, texts: list[str]) -> list[Tensor]:
        return [torch.tensor(each.ids) for each in self.tokenizer.encode_batch(texts)]


def source_lm(text: SourceText, seed: int) -> nn.Module:
    """A Llama of 2 blocks of width 64, after 300 steps of AdamW on 8 windows of 192 tokens."""
    lm = small_llama(VOCABULARY, 2, POSITIONS, seed=seed)
    options = dict(length=LENGTH, batch=BATCH, steps=STEPS, rate=RATE, seed=seed)
    return train_on_windows(lm, torch.cat(text.texts), **options)
