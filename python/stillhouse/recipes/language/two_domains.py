"""Text of two domains by the byte, pairs of a true and a false continuation of it, and a causal
language model of residual feed-forward blocks: the test bed of mixtures of experts.

The domains are the standard library's source and the one-line descriptions of Debian's packages.
"""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse import data
from stillhouse.methods.language import preference_batch
from stillhouse.train.examples import Example

DOMAINS = ("source", "packages")
SIZE = 1_500_000  # bytes a domain, of which the last tenth is held out
VOCABULARY = 64  # the 63 commonest bytes and "other"
CONTEXT = 8
LENGTH = 32  # symbols in a window
PROMPT = 12  # of them given, where there is a response
WORD = re.compile(rb"(?<![a-z0-9_])[a-z_]{4,12}(?=[^a-z0-9_])")


class TwoDomains:
    """Both texts, lower case, as symbols. Raises DataUnavailable where one is missing."""

    def __init__(self) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        source = b"".join(path.read_bytes() for path in files)
        packages = data.debian_packages()
        # In an order of their own: neighbours in the alphabet are alike.
        order = torch.randperm(len(packages), generator=torch.Generator().manual_seed(0)).tolist()
        lines = (f"{packages[i].name}: {packages[i].summary}\n" for i in order)
        self.texts = [text.lower()[:SIZE] for text in (source, "".join(lines).encode())]
        for domain, text in zip(DOMAINS, self.texts, strict=True):
            if len(text) < SIZE:
                raise data.DataUnavailable(f"expected {SIZE} bytes of {domain}, found {len(text)}")
        raw = torch.stack(
            [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in self.texts]
        )
        common = raw.flatten().bincount(minlength=256).argsort(descending=True, stable=True)
        self.symbol_of = torch.full((256,), VOCABULARY - 1)
        self.symbol_of[common[: VOCABULARY - 1]] = torch.arange(VOCABULARY - 1)
        self.symbols = self.symbol_of[raw.long()]

    def windows(
        self, count: int, generator: torch.Generator, *, held: bool = False
    ) -> tuple[Tensor, Tensor]:
        """ids [2 count, 32], those of the source first, and the domains [2 count]."""
        starts = self._starts(count, generator, held)
        places = starts[:, :, None] + torch.arange(LENGTH)
        ids = self.symbols[torch.arange(2)[:, None, None], places]
        return ids.flatten(0, 1), torch.arange(2).repeat_interleave(count)

    def pairs(
        self, count: int, generator: torch.Generator, *, held: bool = False
    ) -> dict[str, Any]:
        """2 `count` pairs: 20 symbols after 12, and the same with a word of them replaced by one of
        the same length from the other domain, as often as it occurs in its text for training."""
        preferred, other = [], []
        for domain, text in enumerate(self.texts):
            words = self._words(1 - domain)
            found = 0
            while found < count:
                start = int(self._starts(1, generator, held)[domain])
                window = text[start : start + LENGTH]
                word = WORD.search(window, PROMPT)
                if word is None:
                    continue
                choices = words[len(word[0])]
                drawn = choices[int(torch.randint(len(choices), (1,), generator=generator))]
                if drawn == word[0]:
                    continue
                changed = window[: word.start()] + drawn + window[word.end() :]
                preferred.append(self._example(window))
                other.append(self._example(changed))
                found += 1
        return preference_batch(preferred, other)

    def _starts(self, count: int, generator: torch.Generator, held: bool) -> Tensor:
        split = SIZE * 9 // 10
        low, high = (split, SIZE - LENGTH) if held else (0, split - LENGTH)
        return torch.randint(low, high, (2, count), generator=generator)

    def _words(self, domain: int) -> dict[int, list[bytes]]:
        by_length: dict[int, list[bytes]] = {length: [] for length in range(4, 13)}
        for word in WORD.findall(self.texts[domain], 0, SIZE * 9 // 10):
            by_length[len(word)].append(word)
        return by_length

    def _example(self, window: bytes) -> Example:
        ids = self.symbol_of[torch.frombuffer(bytearray(window), dtype=torch.uint8).long()]
        return Example(ids.numpy(), np.arange(LENGTH) >= PROMPT)


class Gated(nn.Module):
    """down(silu(gate(x)) up(x))"""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + mlp(norm(x))"""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.mlp = Gated(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class BlockLM(nn.Module):
    """Logits [B, T, 64] of ids [B, T]: each from the last 8 symbols, where before a sequence the
    commonest one is taken to stand."""

    def __init__(self, width: int, inner: int, depth: int, seed: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.mix = nn.Linear(CONTEXT * width, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, inner) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> Tensor:
        before = nn.functional.pad(input_ids, (CONTEXT - 1, 0)).unfold(1, CONTEXT, 1)
        x = self.mix(self.embedding(before).flatten(2))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
