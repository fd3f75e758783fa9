"""Where the responses of a distillation come from: stored text, the teacher, the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stillhouse.progress import Progress
from stillhouse.train.responses import Responses, Tokens, rollout, tokens

Pair = tuple[Tensor, Tensor]  # prompt, response

CHUNK = 64  # responses drawn at a time where all of them are

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


class ResponseSource:
    """Batches of prompts with responses: `batch(n)` goes on through the prompts, epoch by epoch.

    prompts: token ids, one sequence each. One or two of: `dataset`, a stored response for each
    prompt; `teacher` and `student`, models that `rollout` draws from. Of two the first of student,
    teacher, dataset has the probability `share`, the other one the rest, drawn anew for each batch
    or each row (`per`). `share` is an attribute that may be moved while training.

    online: models respond anew at each visit; otherwise once, `generations` times to each prompt,
    and these responses are kept: an epoch visits each of them. replay: a `Replay` of the student's
    responses. revise: `revise(responses, seed=...) -> Responses`, what becomes of each response of
    the student before it is used or kept. max_new_tokens, temperature, top_k, top_p, eos_token_id:
    as in `rollout`, for models. shuffle: each epoch in an order of its own.

    Everything is decided by `seed` and the number of batches so far. `batch` returns `Responses`
    on the CPU. Raises ValueError for no source or three, a share that has no second source, several
    generations of what is not kept, and `rollout`'s reasons.

    Defaults: share 1 (on-policy, as DistillSpec, arXiv 2310.08461), a choice for each batch (GKD,
    arXiv 2306.13649).

    Example:
        >>> from stillhouse.train import ResponseSource
        >>> prompts, answers = [[1, 2], [3]], [[7], [8, 9]]
        >>> source = ResponseSource(prompts, dataset=answers, shuffle=False)
        >>> source.batch(2).ids.tolist()
        [[1, 2, 7], [3, 8, 9]]
    """

    def __init__(
        self,
        prompts: Sequence[Tokens],
        *,
        dataset: Sequence[Tokens] | None = None,
        teacher: Any = None,
        student: Any = None,
        share: float = 1.0,
        per: Literal["batch", "row"] = "batch",
        online: bool = True,
        generations: int = 1,
        replay: Replay | None = None,
        revise: Callable[..., Responses] | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ):
        self.prompts = [each.cpu() for each in tokens(prompts)]
        if not self.prompts:
            raise ValueError("a source needs at least one prompt")
        given = {"student": student, "teacher": teacher, "dataset": dataset}
        self._sources = {name: each for name, each in given.items() if each is not None}
        if not 1 <= len(self._sources) <= 2:
            raise ValueError(
                "a source needs one or two of student, teacher and dataset, got "
                f"{' and '.join(self._sources) or 'none'}"
            )
        if not 0 <= share <= 1 or (share < 1 and len(self._sources) == 1):
            raise ValueError(f"share must be in [0, 1], and 1 where there is one source: {share}")
        if per not in ("batch", "row"):
            raise ValueError(f"per must be 'batch' or 'row', got {per!r}")
        has_model = self._sources.keys() & {"student", "teacher"}
        if has_model and max_new_tokens is None:
            raise ValueError("models need max_new_tokens=, the longest response")
        if generations < 1 or (generations > 1 and (online or not has_model)):
            raise ValueError(
                f"generations={generations}: at least 1, and more only of models with online=False"
            )
        if (replay or revise) and student is None:
            raise ValueError("replay and revise are for the responses of a student")
        if replay and not online:
            raise ValueError("replay is for responses that are drawn anew: online=True")
        if dataset is not None and len(dataset) != len(self.prompts):
            raise ValueError(f"{len(self.prompts)} prompts and {len(dataset)} stored responses")
        self.share, self.per, self.online, self.generations = share, per, online, generations
        self.replay, self.revise, self.shuffle, self.seed = replay, revise, shuffle, seed
        self.options = dict(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
        )
        self._kept: dict[str, list[Tensor]] = {}
        if dataset is not None:
            self._kept["dataset"] = [torch.as_tensor(x, dtype=torch.int64).cpu() for x in dataset]
        self._order: tuple[int, list[int]] | None = None  # of an epoch
        self._visited = self._batches = 0

    @property
    def epoch(self) -> int:
        """How many times everything has been visited."""
        return self._visited // (len(self.prompts) * self.generations)

    def batch(self, n: int) -> Responses:
        """The next n prompts with a response each."""
        if n < 1:
            raise ValueError(f"a batch has at least one prompt, got {n}")
        items = [self._next() for _ in range(n)]
        pairs: list[Pair | None] = [None] * n
        chosen = self._choose(self.share, n, SHARE)
        for name, own in zip(self._sources, (True, False), strict=False):
            rows = [row for row in range(n) if chosen[row] == own]
            for row, pair in zip(rows, self._take(name, [items[row] for row in rows]), strict=True):
                pairs[row] = pair
        self._batches += 1
        return Responses.of(*zip(*pairs, strict=True))

    def _next(self) -> int:
        """The number of the next prompt and generation."""
        count = len(self.prompts) * self.generations
        epoch, place = divmod(self._visited, count)
        self._visited += 1
        if not self.shuffle:
            return place
        if self._order is None or self._order[0] != epoch:
            order = torch.randperm(count, generator=self._generator(ORDER, epoch))
            self._order = epoch, order.tolist()
        return self._order[1][place]

    def _take(self, name: str, items: list[int]) -> list[Pair]:
        """What this source has for these items."""
        if not items:
            return []
        prompts = [self.prompts[item // self.generations] for item in items]
        if name == "dataset":
            kept = self._kept[name]
            responses = [kept[item // self.generations] for item in items]
        elif not self.online:
            if name not in self._kept:
                self._kept[name] = self._draw_all(name)
            responses = [self._kept[name][item] for item in items]
        else:
            return self._draw_or_replay(name, prompts)
        return list(zip(prompts, responses, strict=True))

    def _draw_or_replay(self, name: str, prompts: list[Tensor]) -> list[Pair]:
        again = [False] * len(prompts)
        held = [] if self.replay is None or name != "student" else self.replay.held
        if held:
            again = self._choose(self.replay.share, len(prompts), REPLAY)
            generator = self._generator(HELD, self._batches)
            places = torch.randint(len(held), (len(prompts),), generator=generator).tolist()
        fresh = [prompt for prompt, replayed in zip(prompts, again, strict=True) if not replayed]
        drawn: list[Pair] = []
        if fresh:
            seed = _mixed(self.seed, DRAW, self._batches, int(name == "teacher"))
            drawn = self._respond(name, fresh, seed)
            if name == "student" and self.replay is not None:
                self.replay.add(drawn)
        new = iter(drawn)
        return [held[places[i]] if again[i] else next(new) for i in range(len(prompts))]

    def _draw_all(self, name: str) -> list[Tensor]:
        """A response for each item, drawn once."""
        items = [prompt for prompt in self.prompts for _ in range(self.generations)]
        generator = self._generator(STORE, int(name == "teacher"))
        seeds = torch.randint(2**62, (len(items),), generator=generator)
        responses: list[Tensor] = []
        progress = Progress("responses")
        for start in range(0, len(items), CHUNK):
            part = slice(start, start + CHUNK)
            responses += [pair[1] for pair in self._respond(name, items[part], seeds[part])]
            progress(f"responses of the {name}", len(responses), len(items))
        return responses

    def _respond(self, name: str, prompts: list[Tensor], seed: int | Tensor) -> list[Pair]:
        drawn = rollout(self._sources[name], prompts, seed=seed, **self.options)
        if name == "student" and self.revise is not None:
            first = seed if isinstance(seed, int) else int(seed[0])
            drawn = self.revise(drawn, seed=_mixed(self.seed, REVISE, first))
        drawn = drawn.to("cpu")
        return list(zip(drawn.prompts(), drawn.responses(), strict=True))

    def _choose(self, share: float, n: int, purpose: int) -> list[bool]:
        """Whether the first of two is taken, for each row."""
        generator = self._generator(purpose, self._batches)
        count = n if self.per == "row" else 1
        chosen = torch.rand(count, generator=generator, dtype=torch.float64) < share
        return chosen.expand(n).tolist()

    def _generator(self, *purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed(_mixed(self.seed, *purpose))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same batches: where it is, and what is kept
        and replayed. The models are not in it."""
        return {
            "visited": self._visited,
            "batches": self._batches,
            "share": self.share,
            "kept": dict(self._kept),
            "replay": None if self.replay is None else list(self.replay.held),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._visited, self._batches = state["visited"], state["batches"]
        self.share, self._kept = state["share"], dict(state["kept"])
        if self.replay is not None:
            self.replay.held = list(state["replay"] or ())


def _mixed(*numbers: int) -> int:
    """A seed that no other such numbers have."""
    state = np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, "u8")
    return int(state[0] >> np.uint64(1))
