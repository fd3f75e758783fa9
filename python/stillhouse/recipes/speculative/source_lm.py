"""A causal language model that is trained in seconds: Python's own standard library as byte pairs,
the test bed of drafters that learn from text."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stillhouse.progress import Progress
from stillhouse.recipes.language.byte_pairs import byte_pairs

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
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        lm = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    stream = torch.cat(text.texts)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    said = Progress("steps")
    lm.train()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / 20, 1.01 - step / STEPS)
        first = torch.randint(len(stream) - LENGTH, (BATCH,), generator=generator)
        ids = stream[first[:, None] + torch.arange(LENGTH + 1)]
        logits = lm(input_ids=ids[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        said("language model", step + 1, STEPS)
    return lm.eval().requires_grad_(False)
