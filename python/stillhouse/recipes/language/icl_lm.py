"""A language model of four small blocks that learns in context, within three minutes.

Trained on tasks from the start it stays on a plateau: three things have to come together before
any of them pays. So the upper two blocks first learn to look a word's label up, on pairs
"section word", the lower two to read a summary, on lines "summary : section"; then all four learn
on tasks with summaries. Three blocks see a window of words, as small models' do today.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stillhouse.progress import Progress
from stillhouse.recipes.language.section_tasks import (
    SEPARATOR,
    VOCABULARY,
    WORDS,
    SectionTasks,
)
from stillhouse.teachers import TensorCache

WIDTH, HEADS, WINDOW = 64, 2, 4
LAYERS = ["sliding_attention"] * 3 + ["full_attention"]
STEPS = {"words": 600, "sections": 400, "tasks": 1100}
RATE = 4e-3
TEXT_WEIGHT, TEXT_ROWS = 0.2, 0.1
Row = tuple[list[int], list[bool]]  # ids, and which of them are labels


def icl_lm(tasks: SectionTasks, cache: Path) -> tuple[nn.Module, float]:
    """The model, frozen and in evaluation mode, and the seconds that its training took."""
    lm = _make()
    texts = [ids for name in tasks.sections for ids in tasks.train[name]]
    key = {
        "what": "language model of MEND's recipe, 1",
        "sizes": [WIDTH, HEADS, WINDOW, VOCABULARY, WORDS],
        "training": [STEPS, RATE, TEXT_WEIGHT, TEXT_ROWS],
        "text": torch.tensor([each for ids in texts for each in ids]),
    }

    def train() -> dict[str, Tensor]:
        print(f"training a language model of {sum(x.numel() for x in lm.parameters()):,} weights")
        began = time.monotonic()
        _train(lm, tasks)
        state = {name: x.clone() for name, x in lm.state_dict().items()}
        return {**state, "seconds": torch.tensor(time.monotonic() - began)}

    state = TensorCache(cache).get(key, train)
    seconds = state.pop("seconds").item()
    lm.load_state_dict(state)
    return lm.eval().requires_grad_(False), seconds


def _make() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=len(LAYERS),
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=LAYERS,
        initializer_range=WIDTH**-0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = Qwen2ForCausalLM(config)
        with torch.no_grad():
            lm.model.embed_tokens.weight.normal_(std=0.25)
            for block in lm.model.layers:
                # Attention that begins by finding what is alike and copying it.
                attention = block.self_attn
                attention.q_proj.weight.copy_(attention.k_proj.weight)
                attention.o_proj.weight.copy_(0.5 * attention.v_proj.weight.T)
                block.mlp.down_proj.weight.mul_(0.35)
    return lm


def _train(lm: nn.Module, tasks: SectionTasks) -> None:
    draw, body, blocks = random.Random(0), lm.model, lm.model.layers

    def words() -> list[Row]:
        return [examples(tasks, draw, (2, 4), 9, named=True) for _ in range(48)]

    def sections() -> list[Row]:
        rows = [tasks.text(1, draw) for _ in range(256)]
        return [(ids, [False] * (len(ids) - 1) + [True]) for ids in rows]

    def all_tasks() -> list[Row]:
        rows = [examples(tasks, draw, (2, 2, 4), 9) for _ in range(20)]
        texts = [tasks.text(9, draw) for _ in range(4)]
        after = [[i > 0 and ids[i - 1] == SEPARATOR for i in range(len(ids))] for ids in texts]
        return rows + list(zip(texts, after, strict=True))

    for name, part, batches in (
        ("words", slice(2, 4), words),
        ("sections", slice(0, 2), sections),
        ("tasks", slice(0, 4), all_tasks),
    ):
        body.layers, lm.config.layer_types = blocks[part], LAYERS[part]
        _stage(lm, name, batches, STEPS[name])
    body.layers, lm.config.layer_types = blocks, LAYERS


def examples(
    tasks: SectionTasks, draw: random.Random, ways: tuple, count: int, named: bool = False
) -> Row:
    """So many examples of one task, "summary : word" or, `named`, "section word"."""
    some = tasks.sections_of(draw.choice(ways), draw)
    labels = draw.sample(tasks.labels, len(some))
    ids: list[int] = []
    marks: list[bool] = []
    for _ in range(count):
        i = draw.randrange(len(some))
        given = [tasks.section_id[some[i]]] if named else draw.choice(tasks.train[some[i]])
        ids += [*given, labels[i]]
        marks += [False] * len(given) + [True]
    return ids, marks


def _stage(lm: nn.Module, name: str, batches: Callable[[], list[Row]], steps: int) -> None:
    """The labels' cross-entropy, and a little of the text's."""
    optimizer = torch.optim.AdamW(lm.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    draws, progress, losses = torch.Generator().manual_seed(0), Progress("steps"), []
    for step in range(steps):
        rate = RATE * min(1, (step + 1) / 30, 1.05 - step / steps)
        optimizer.param_groups[0]["lr"] = rate
        rows = batches()
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([row + [SEPARATOR] * (width - len(row)) for row, _ in rows])
        marks = torch.tensor([mark + [False] * (width - len(mark)) for _, mark in rows])[:, 1:]
        inside = torch.arange(1, width) < torch.tensor([len(row) for row, _ in rows])[:, None]
        hidden, target = lm.model(ids, use_cache=False).last_hidden_state[:, :-1], ids[:, 1:]
        sampled = torch.rand(target.shape, generator=draws) < TEXT_ROWS
        loss = cross_entropy(lm.lm_head(hidden[marks]), target[marks])
        losses.append(loss.item())
        text = inside & ~marks & sampled
        if name != "words" and bool(text.any()):
            loss = loss + TEXT_WEIGHT * cross_entropy(lm.lm_head(hidden[text]), target[text])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        recent = losses[-50:]
        progress(f"{name}, {sum(recent) / len(recent):.3f} nats a label", step + 1, steps)
