"""Correction of what a student says: its worst token becomes the teacher's, the rest is new."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.train import Responses, rollout, supervised_rows
from stillhouse.train.forward import frozen, row_forward
from stillhouse.train.responses import end_tokens

ROWS = 256  # rows whose logits exist at a time

Score = Literal["kl", "teacher_nll"]


def revise(
    student: Any,
    teacher: Any,
    responses: Responses,
    *,
    score: Score = "kl",
    rounds: int = 1,
    seed: int,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Iterable[int] | None = None,
) -> Responses:
    """Sequence correction and re-generation: of each response the error token is replaced by the
    teacher's likeliest one, and what follows is drawn from the student again; `rounds` times.

    The error token is where student and teacher differ most (`error_positions`); a response without
    one stays as it is, and so does what is before it. student, teacher: as in `train.rollout`.
    max_new_tokens: the longest response; None: the longest one among `responses`. temperature,
    top_k, top_p, eos_token_id: of the student's drawing. A teacher's token that ends a response
    ends it. As a `ResponseSource`'s revise: `functools.partial(revise, student, teacher)`.
    Raises ValueError for an unknown score, rounds < 0, empty responses, unlike vocabularies, and
    `rollout`'s reasons.

    Defaults: one round, temperature 1 (the paper); score "kl" (the paper): it does not look at the
    token itself, and "teacher_nll", -log p of the token, does.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import revise
        >>> from stillhouse.train import Responses
        >>> def counts(step):  # a model that says the next number, or the one after it
        ...     return lambda ids: 9.0 * torch.nn.functional.one_hot((ids + step) % 8, 8).float()
        >>> said = Responses.of([[0]], [[2, 4, 6]])
        >>> revised = revise(counts(2), counts(1), said, seed=0, temperature=0)
        >>> revised.responses()
        [tensor([1, 3, 5])]
    """
    if rounds < 0:
        raise ValueError(f"rounds must be at least 0, got {rounds}")
    limit = int(responses.mask.sum(1).max()) if max_new_tokens is None else max_new_tokens
    ends = end_tokens(student, eos_token_id)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, eos_token_id=ends)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        # Every row has its own, whichever of the others are revised.
        seeds = torch.randint(2**62, (len(responses),), generator=generator)
        positions, tokens = error_positions(student, teacher, responses, score=score)
        prompts, said = responses.prompts(), responses.responses()
        unfinished: dict[int, int] = {}  # row -> tokens that may follow
        for row, position in enumerate(positions.tolist()):
            if position >= 0:
                said[row] = torch.cat([said[row][:position], tokens[row, None]])
                room = limit - position - 1
                if room > 0 and int(tokens[row]) not in ends:
                    unfinished[row] = room
        if unfinished:
            begun = [torch.cat([prompts[row], said[row]]) for row in unfinished]
            longest = max(unfinished.values())
            rest = rollout(
                student, begun, max_new_tokens=longest, seed=seeds[list(unfinished)], **options
            ).responses()
            for (row, room), new in zip(unfinished.items(), rest, strict=True):
                said[row] = torch.cat([said[row], new[:room]])
        responses = Responses.of(prompts, said)
    return responses


@torch.no_grad()
def error_positions(
    student: Any, teacher: Any, responses: Responses, *, score: Score = "kl"
) -> tuple[Tensor, Tensor]:
    """The error token of each response: (its place in the response, the teacher's token there),
    both int64 [B]; the place is -1 where the teacher's likeliest token is the response's own
    everywhere.

    Among the tokens that are not the teacher's likeliest one, it is that with the largest
    KL(teacher || student), or -log p of the token under the teacher. Raises ValueError for an
    unknown score, a response without a token, and unlike vocabularies.
    """
    if score not in ("kl", "teacher_nll"):
        raise ValueError(f"score must be 'kl' or 'teacher_nll', got {score!r}")
    if not bool(responses.mask.any(1).all()):
        raise ValueError("a response without a token has nothing to revise")
    batch = responses.batch()
    index = supervised_rows(batch["labels"])
    scores, likeliest = [], []
    with frozen(student, teacher):
        own, other = (row_forward(model)(batch, index) for model in (student, teacher))
        for start in range(0, len(own), ROWS):
            part = slice(start, start + ROWS)
            q, p = own.part(part).logits, other.part(part).logits
            kl = ops.divergence(q, p, "forward_kl")
            if score == "teacher_nll":
                kl = ops.divergence(p, None, "cross_entropy", labels=index.target[part])
            scores.append(kl)
            likeliest.append(p.argmax(-1))
    top = torch.cat(likeliest)
    value = torch.cat(scores).masked_fill(top == index.target, -torch.inf)
    place = index.row % batch["labels"].shape[1] + 1 - responses.prompt_length[index.sequence]
    table = value.new_full(batch["labels"].shape, -torch.inf)
    table[index.sequence, place] = value
    largest, position = table.max(1)
    tokens = torch.zeros_like(batch["labels"])
    tokens[index.sequence, place] = top
    chosen = tokens.gather(1, position[:, None])[:, 0]
    return position.masked_fill(largest == -torch.inf, -1), chosen
