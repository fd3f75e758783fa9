"""A language model of what the prompts say, small enough to train in seconds: the text teacher of
the speech recipes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from stillhouse.data import speech
from stillhouse.teachers import TensorCache

WIDTH, LAYERS, EPOCHS, BATCH = 96, 2, 40, 32


class WordLM(nn.Module):
    """Next words after words, by gated recurrence; a sentence begins and ends with word 0."""

    def __init__(self, words: Sequence[str], seed: int = 0):
        super().__init__()
        self.index = {word: number for number, word in enumerate(words, start=1)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(len(words) + 1, WIDTH)
            self.layers = nn.ModuleList(
                nn.GRU(WIDTH, WIDTH, batch_first=True) for _ in range(LAYERS)
            )
            self.head = nn.Linear(WIDTH, len(words) + 1)

    def states(self, ids: Tensor) -> list[Tensor]:
        """Of ids [B, T], after each layer from the embedding on, [B, T, 96]."""
        states = [self.embedding(ids)]
        for layer in self.layers:
            states.append(states[-1] + layer(states[-1])[0])
        return states

    @torch.no_grad()
    def read(self, words: Sequence[str]) -> Tensor:
        """The mean over all layers at each word, as DM-Codec takes BERT's: [words, 96]."""
        ids = torch.tensor([[0, *(self.index[word] for word in words)]])
        return torch.stack(self.states(ids)).mean(0)[0, 1:]


def train_word_lm(texts: Sequence[Sequence[str]], seed: int = 0) -> tuple[WordLM, float]:
    """A model of all words of the texts, and its last epoch's loss in nats a word."""
    model = WordLM(_words(texts), seed)
    rows = [torch.tensor([0, *(model.index[word] for word in text), 0]) for text in texts]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        total, count = 0.0, 0
        for chosen in torch.randperm(len(rows), generator=generator).split(BATCH):
            batch = pad_sequence([rows[i] for i in chosen.tolist()], True, padding_value=-1)
            logits = model.head(model.states(batch[:, :-1].clamp(min=0))[-1])
            loss = cross_entropy(logits.mT, batch[:, 1:], ignore_index=-1, reduction="sum")
            words = int((batch[:, 1:] >= 0).sum())
            optimizer.zero_grad()
            (loss / words).backward()
            optimizer.step()
            total, count = total + loss.item(), count + words
    return model, total / count


def kept_word_lm(texts: Sequence[Sequence[str]]) -> tuple[WordLM, float]:
    """`train_word_lm`, once: then from the user's cache."""

    def compute() -> dict[str, Tensor]:
        model, loss = train_word_lm(texts)
        return {**model.state_dict(), "loss": torch.tensor(loss)}

    sizes = [WIDTH, LAYERS, EPOCHS, BATCH]
    key = {"kind": "word LM of prompts", "sizes": sizes, "texts": [list(text) for text in texts]}
    stored = TensorCache(speech.user_cache()).get(key, compute)
    model, loss = WordLM(_words(texts)), stored.pop("loss").item()
    model.load_state_dict(stored)
    return model, loss


def _words(texts: Sequence[Sequence[str]]) -> list[str]:
    return sorted({word for text in texts for word in text})
