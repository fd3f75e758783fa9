"""Causal language models that are trained from nothing in seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stillhouse.progress import Progress


def small_llama(
    vocabulary: int,
    blocks: int,
    positions: int,
    *,
    seed: int,
    width: int = 64,
    ffn: int = 128,
    end: int | None = None,
) -> nn.Module:
    """A Llama of four heads with tied embeddings, its weights drawn with the seed; `end` is a
    token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=end,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train_on_windows(
    lm: nn.Module,
    stream: Tensor,
    *,
    length: int,
    batch: int,
    steps: int,
    rate: float,
    seed: int,
    starts: Tensor | None = None,
) -> nn.Module:
    """The model, frozen, after steps of AdamW on windows of a stream of tokens [N].

    Windows begin at any of `starts`, or anywhere. The rate rises for 20 steps, then it falls in a
    line, to a hundredth.
    """
    generator = torch.Generator().manual_seed(seed)
    if starts is None:
        starts = torch.arange(len(stream) - length)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    said = Progress("steps")
    lm.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 20, 1.01 - step / steps)
        first = starts[torch.randint(len(starts), (batch,), generator=generator)]
        ids = stream[first[:, None] + torch.arange(length + 1)]
        logits = lm(input_ids=ids[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        said("language model", step + 1, steps)
    return lm.eval().requires_grad_(False)
