"""Where the responses of a distillation come from: stored text, the teacher, the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from stillhouse.progress import Progress
from stillhouse.train.drawing import ORDER, SHARE, STORE, Drawing, Pair, Replay
from stillhouse.train.responses import Responses, Tokens, tokens

CHUNK = 64  # responses drawn at a time where all of them are


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
        if share < 1 and len(self._sources) == 1:
            raise ValueError(f"share must be 1 where there is one source, got {share}")
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
        self.online, self.generations, self.shuffle = online, generations, shuffle
        self._drawing = Drawing(
            share=share,
            per=per,
            replay=replay,
            revise=revise,
            seed=seed,
            options=dict(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                eos_token_id=eos_token_id,
            ),
        )
        self._kept: dict[str, list[Tensor]] = {}
        if dataset is not None:
            self._kept["dataset"] = [torch.as_tensor(x, dtype=torch.int64).cpu() for x in dataset]
        self._order: tuple[int, list[int]] | None = None  # of an epoch
        self._visited = self._batches = 0

    @property
    def share(self) -> float:
        """Probability of the first of two sources."""
        return self._drawing.share

    @share.setter
    def share(self, share: float) -> None:
        self._drawing.share = share

    @property
    def replay(self) -> Replay | None:
        """Responses of the student that are used again."""
        return self._drawing.replay

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
        chosen = self._drawing.choose(self.share, n, SHARE, self._batches)
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
            order = torch.randperm(count, generator=self._drawing.generator(ORDER, epoch))
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
            model, student = self._sources[name], name == "student"
            return self._drawing.draw(model, prompts, self._batches, student=student)
        return list(zip(prompts, responses, strict=True))

    def _draw_all(self, name: str) -> list[Tensor]:
        """A response for each item, drawn once."""
        items = [prompt for prompt in self.prompts for _ in range(self.generations)]
        student = name == "student"
        generator = self._drawing.generator(STORE, int(not student))
        seeds = torch.randint(2**62, (len(items),), generator=generator)
        responses: list[Tensor] = []
        progress = Progress("responses")
        for start in range(0, len(items), CHUNK):
            part = slice(start, start + CHUNK)
            model = self._sources[name]
            drawn = self._drawing.respond(model, items[part], seeds[part], student=student)
            responses += [pair[1] for pair in drawn]
            progress(f"responses of the {name}", len(responses), len(items))
        return responses

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
