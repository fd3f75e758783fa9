"""Drawing responses while training: anew or again, revised, by seeds of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stillhouse.train.responses import Responses, rollout

Pair = tuple[Tensor, Tensor]  # prompt, response

# What a seed is for: no two purposes share their random numbers.
ORDER, SHARE, REPLAY, HELD, DRAW, STORE, REVISE = range(7)


@dataclass
class Replay:
    """Keeps the last `capacity` responses of the student; `share` of what is due to be drawn from
    it comes from here once there is something (DistiLLM, arXiv 2402.03898). `share` may be moved
    while training."""

    capacity: int = 1000
    share: float = 0.5
    held: list[Pair] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.capacity < 1 or not 0 <= self.share <= 1:
            raise ValueError(
                f"expected capacity >= 1 and a share in [0, 1], got {self.capacity}, {self.share}"
            )

    def add(self, pairs: Sequence[Pair]) -> None:
        """Keep these, and let the oldest go."""
        self.held = [*self.held, *pairs][-self.capacity :]


class Drawing:
    """What `ResponseSource` and `OnPolicy` do alike: they choose who responds, and draw.

    number: of the batch; with `seed` it decides everything.
    """

    def __init__(
        self,
        *,
        share: float,
        per: Literal["batch", "row"],
        replay: Replay | None,
        revise: Callable[..., Responses] | None,
        seed: int,
        options: dict[str, Any],
    ):
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in [0, 1], got {share}")
        if per not in ("batch", "row"):
            raise ValueError(f"per must be 'batch' or 'row', got {per!r}")
        self.share, self.per, self.replay, self.revise = share, per, replay, revise
        self.seed, self.options = seed, options

    def choose(self, share: float, n: int, purpose: int, number: int) -> list[bool]:
        """Whether the first of two is taken, for each of n rows."""
        generator = self.generator(purpose, number)
        count = n if self.per == "row" else 1
        chosen = torch.rand(count, generator=generator, dtype=torch.float64) < share
        return chosen.expand(n).tolist()

    def draw(
        self, model: Any, prompts: list[Tensor], number: int, *, student: bool = True
    ) -> list[Pair]:
        """Responses of a model to these prompts; a student's may be replayed ones, to others."""
        again = [False] * len(prompts)
        held = self.replay.held if student and self.replay is not None else []
        if held:
            again = self.choose(self.replay.share, len(prompts), REPLAY, number)
            generator = self.generator(HELD, number)
            places = torch.randint(len(held), (len(prompts),), generator=generator).tolist()
        fresh = [prompt for prompt, replayed in zip(prompts, again, strict=True) if not replayed]
        drawn: list[Pair] = []
        if fresh:
            seed = mixed(self.seed, DRAW, number, int(not student))
            drawn = self.respond(model, fresh, seed, student=student)
            if student and self.replay is not None:
                self.replay.add(drawn)
        new = iter(drawn)
        return [held[places[i]] if again[i] else next(new) for i in range(len(prompts))]

    def respond(
        self, model: Any, prompts: list[Tensor], seed: int | Tensor, *, student: bool
    ) -> list[Pair]:
        """Responses drawn anew, a student's revised; on the CPU."""
        drawn = rollout(model, prompts, seed=seed, **self.options)
        if student and self.revise is not None:
            first = seed if isinstance(seed, int) else int(seed[0])
            drawn = self.revise(drawn, seed=mixed(self.seed, REVISE, first))
        drawn = drawn.to("cpu")
        return list(zip(drawn.prompts(), drawn.responses(), strict=True))

    def generator(self, *purpose: int) -> torch.Generator:
        """One that nothing else uses."""
        return torch.Generator().manual_seed(mixed(self.seed, *purpose))


def mixed(*numbers: int) -> int:
    """A seed that no other such numbers have."""
    state = np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, "u8")
    return int(state[0] >> np.uint64(1))
