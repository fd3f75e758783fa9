"""Responses of the student in the place of the data's, drawn in the middle of a training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from stillhouse.train.drawing import SHARE, Drawing, Replay, mixed
from stillhouse.train.examples import STORED
from stillhouse.train.responses import Responses
from stillhouse.train.rows import IGNORED


class OnPolicy:
    """What `DistillTrainer(on_policy=...)` does to a batch before it is trained on.

    With the probability `share`, for each batch or each row (`per`), the student responds to the
    row's prompt, and that takes the place of what the data has. The prompt is what comes before the
    row's last run of targets; of text, which is nothing but targets, it is the first
    `prompt_tokens` tokens. A row that is no longer than that stays as it is.

    max_new_tokens, temperature, top_k, top_p, eos_token_id: as in `train.rollout`. replay: a
    `Replay` of earlier responses. revise: `revise(responses, seed=...) -> Responses`, what becomes
    of them before they are used; an objective with a method `revise` brings its own. `share` may be
    moved while training, by an `AdaptiveShare` for example. Everything is decided by `seed`, the
    number of the batch and the process.
    Raises ValueError for numbers out of range and for batches with the rows of a stored teacher, or
    with documents or prefixes of their own.

    Defaults: share 1 and a choice for each batch (GKD, arXiv 2306.13649), temperature 1.
    """

    def __init__(
        self,
        share: float = 1.0,
        *,
        max_new_tokens: int,
        prompt_tokens: int = 32,
        per: Literal["batch", "row"] = "batch",
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        replay: Replay | None = None,
        revise: Callable[..., Responses] | None = None,
        seed: int = 0,
    ):
        if max_new_tokens < 1 or prompt_tokens < 1:
            raise ValueError(
                "max_new_tokens and prompt_tokens must be at least 1, got "
                f"{max_new_tokens} and {prompt_tokens}"
            )
        self.prompt_tokens = prompt_tokens
        self.options = dict(  # of `rollout`
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
        )
        self._drawing = Drawing(
            share=share, per=per, replay=replay, revise=revise, seed=seed, options=self.options
        )

    @property
    def share(self) -> float:
        """Probability that the student responds."""
        return self._drawing.share

    @share.setter
    def share(self, share: float) -> None:
        self._drawing.share = share

    @property
    def replay(self) -> Replay | None:
        """Responses of the student that are used again."""
        return self._drawing.replay

    @property
    def revise(self) -> Callable[..., Responses] | None:
        """What becomes of the student's responses before they are used."""
        return self._drawing.revise

    @revise.setter
    def revise(self, revise: Callable[..., Responses] | None) -> None:
        self._drawing.revise = revise

    def __call__(
        self, student: Any, batch: Mapping[str, Tensor], number: int, *, process: int = 0
    ) -> tuple[dict[str, Tensor], float]:
        """The batch to train on, on the devices of the one given, and the share of its targets
        that the student has written."""
        other = [name for name in (*STORED, "prefix_length", "document_ids") if name in batch]
        if other:
            raise ValueError(f"the student cannot respond in a batch with {other[0]}")
        labels = batch["labels"].cpu()
        key = mixed(number, process)
        chosen = self._drawing.choose(self.share, len(labels), SHARE, key)
        rows = []  # (ids, labels), without padding
        for ids, row_labels, mask in zip(
            batch["input_ids"].cpu(), labels, batch["attention_mask"].cpu(), strict=True
        ):
            length = int(mask.sum())
            rows.append((ids[:length], row_labels[:length]))
        prompts: dict[int, Tensor] = {}
        for row, ((ids, row_labels), own) in enumerate(zip(rows, chosen, strict=True)):
            start = self._prompt_length(row_labels) if own else 0
            if start:
                prompts[row] = ids[:start]
        if not prompts:
            return dict(batch), 0.0
        drawn = self._drawing.draw(student, list(prompts.values()), key)
        for row, (prompt, response) in zip(prompts, drawn, strict=True):
            unread = torch.full_like(prompt, IGNORED)
            rows[row] = torch.cat([prompt, response]), torch.cat([unread, response])
        written = sum(len(response) for _, response in drawn)
        total = sum(int((labels != IGNORED).sum()) for _, labels in rows)
        return {**batch, **_padded(rows, batch)}, written / total

    def _prompt_length(self, labels: Tensor) -> int:
        """How many tokens of a row are the prompt; 0 where there is nothing to respond to."""
        targets = (labels != IGNORED).nonzero()[:, 0]
        if not len(targets):
            return 0
        gaps = (targets.diff() > 1).nonzero()[:, 0]
        start = int(targets[int(gaps[-1]) + 1] if len(gaps) else targets[0])
        if start > 1:
            return start
        # Nothing predicts the first token: targets from the second on are those of bare text.
        return self.prompt_tokens if len(labels) > self.prompt_tokens else 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the share, and what is replayed."""
        held = None if self.replay is None else list(self.replay.held)
        return {"share": self.share, "replay": held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.share = state["share"]
        if self.replay is not None:
            self.replay.held = list(state["replay"] or ())


class AdaptiveShare:
    """DistiLLM's adaptive off-policy schedule, for a source with `share` and `replay`.

    The student's share begins at 0 and grows by `increment` whenever the validation loss is above
    the one that counts by `tolerance` or more, and then counts itself; the first one counts. Of
    what is due to the student a share n / N, at step n of N, is replayed.

    Paper: DistiLLM: Towards Streamlined Distillation for Large Language Models, ICML 2024, arXiv
    2402.03898, Algorithm 1. Defaults: increment 0.1, tolerance 0.1 (the authors' code).
    Raises ValueError for a source without `Replay`, an increment outside (0, 1], tolerance < 0.

    Example:
        >>> from stillhouse.train import AdaptiveShare, OnPolicy, Replay
        >>> source = OnPolicy(0.0, max_new_tokens=8, replay=Replay())
        >>> schedule = AdaptiveShare(source)
        >>> for loss in (3.0, 2.5, 3.2):
        ...     schedule.evaluated(loss)
        >>> schedule.update({}, step=25, total_steps=100)
        >>> source.share, source.replay.share
        (0.1, 0.25)
    """

    def __init__(self, source: Any, *, increment: float = 0.1, tolerance: float = 0.1):
        if getattr(source, "replay", None) is None:
            raise ValueError("an adaptive share needs a source with replay=Replay(...)")
        if not 0 < increment <= 1 or tolerance < 0:
            raise ValueError(
                f"expected increment in (0, 1] and tolerance >= 0, got {increment}, {tolerance}"
            )
        self.source, self.increment, self.tolerance = source, increment, tolerance
        self.loss: float | None = None
        source.share = source.replay.share = 0.0

    @property
    def value(self) -> float:
        """The student's share."""
        return self.source.share

    def evaluated(self, loss: float) -> None:
        """Take note of a validation loss, in nats a token."""
        if self.loss is None:
            self.loss = loss
        elif loss >= self.loss + self.tolerance:
            self.source.share = min(1.0, self.source.share + self.increment)
            self.loss = loss

    def update(self, stats: Mapping[str, float], step: int, total_steps: int) -> None:
        """After each step."""
        self.source.replay.share = min(1.0, step / total_steps)

    def state_dict(self) -> dict[str, Any]:
        """The loss that counts; the shares are the source's."""
        return {"loss": self.loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loss = state["loss"]


def _padded(rows: Sequence[tuple[Tensor, Tensor]], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows of unlike lengths as a batch, padded on the right as the collator does."""
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence(list(each), batch_first=True, padding_value=value)
        for each, value in zip(zip(*rows, strict=True), (0, IGNORED), strict=True)
    )
    lengths = torch.tensor([len(row) for row, _ in rows])
    place = torch.arange(ids.shape[1])
    made = {
        "input_ids": ids,
        "attention_mask": (place < lengths[:, None]).long(),
        "labels": labels,
    }
    return {name: each.to(like[name].device, like[name].dtype) for name, each in made.items()}
