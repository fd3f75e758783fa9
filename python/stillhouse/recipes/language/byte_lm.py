"""A language model small enough to train in seconds: a byte-level MLP on this interpreter's own
standard library, the test bed of the language recipes."""

import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding

from stillhouse.train import LogitRows, Objective, RowIndex

VOCABULARY = 48
CONTEXT = 8
BATCH = 512
HELD_OUT = 4000


class ByteText:
    """The standard library's source, lower case, as symbols: the 47 commonest bytes and "other".

    Contexts are drawn from the first 90 %, the held-out set (4,000 contexts) from the rest.
    """

    def __init__(self, size: int = 1_500_000):
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"".join(path.read_bytes() for path in files)[:size].lower()
        if len(text) < size:
            raise FileNotFoundError(
                f"expected {size} bytes of standard-library source, found {len(text)}: "
                "this interpreter was installed without its .py files"
            )
        raw = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        common = raw.bincount(minlength=256).argsort(descending=True, stable=True)
        symbol_of = torch.full((256,), VOCABULARY - 1)
        symbol_of[common[: VOCABULARY - 1]] = torch.arange(VOCABULARY - 1)
        self.symbols = symbol_of[raw]
        self.split = int(0.9 * size)
        generator = torch.Generator().manual_seed(0)
        self.held_out = self._contexts(HELD_OUT, self.split + CONTEXT, size, generator)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(contexts [512, 8], next symbol [512])"""
        return self._contexts(BATCH, CONTEXT, self.split, generator)

    def _contexts(self, count: int, low: int, high: int, generator) -> tuple[Tensor, Tensor]:
        end = torch.randint(low, high, (count,), generator=generator)
        return self.symbols[end[:, None] + torch.arange(-CONTEXT, 0)], self.symbols[end]


class ByteLM(nn.Module):
    """Logits [N, 48] of the next symbol from the last `context` of the given ones [N, 8]."""

    def __init__(self, context: int, width: int, hidden: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * scale)

        fan_in = context * width
        self.context = context
        self.embedding = normal(VOCABULARY, width, scale=0.5)
        self.hidden = normal(fan_in, hidden, scale=fan_in**-0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.head = normal(hidden, VOCABULARY, scale=0.5 * hidden**-0.5)
        self.head_bias = nn.Parameter(torch.zeros(VOCABULARY))

    def forward(self, contexts: Tensor) -> Tensor:
        embedded = embedding(contexts[:, -self.context :], self.embedding).flatten(1)
        activation = torch.tanh(torch.addmm(self.hidden_bias, embedded, self.hidden))
        return torch.addmm(self.head_bias, activation, self.head)


class CausalByteLM(nn.Module):
    """A `ByteLM` on whole sequences: ids [B, T] to logits [B, T, 48]. What comes before a sequence
    is the commonest symbol."""

    def __init__(self, model: ByteLM):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        contexts = nn.functional.pad(ids, (CONTEXT - 1, 0)).unfold(1, CONTEXT, 1)
        return self.model(contexts.flatten(0, 1)).view(*ids.shape, VOCABULARY)


def train(
    model: ByteLM,
    text: Any,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    steps: int,
    learning_rate: float,
    decay: bool = True,
    seed: int,
    extra: Iterable[nn.Parameter] = (),
) -> None:
    """Adam on `loss(logits, contexts, targets)` of `text.batch(generator)`, a `ByteText` or the
    like; the rate falls linearly to 1e-4 with `decay`. extra: parameters of the loss itself."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([*model.parameters(), *extra], lr=learning_rate, betas=(0.9, 0.99))
    for step in range(steps):
        if decay:
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps) + 1e-4
        contexts, targets = text.batch(generator)
        value = loss(model(contexts), contexts, targets)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def label_loss(logits: Tensor, contexts: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, for `train`."""
    return cross_entropy(logits, targets)


def distill(
    student: ByteLM,
    teacher: ByteLM,
    text: ByteText,
    objective: Objective,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> dict[str, list[float]]:
    """Trains the student by an objective, its parameters too, and updates it after each step;
    returns what it reported, step by step."""
    trace: list[dict[str, float]] = []

    def loss(logits: Tensor, contexts: Tensor, targets: Tensor) -> Tensor:
        rows = torch.arange(len(targets))
        index = RowIndex(row=rows, target=targets, sequence=rows)
        parts = objective(LogitRows(logits, index), LogitRows(teacher(contexts), index), {})
        trace.append({name: value.item() for name, value in parts.items()})
        if hasattr(objective, "update"):
            objective.update(trace[-1], len(trace), steps)
        return parts["loss"]

    extra = getattr(objective, "parameters", list)()
    options = dict(steps=steps, learning_rate=learning_rate, seed=seed)
    train(student, text, loss, extra=extra, **options)
    return {name: [step[name] for step in trace] for name in trace[0]}
