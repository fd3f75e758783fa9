"""Responses to prompts, and drawing them from a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.train.forward import evaluating, plain_logits
from stillhouse.train.rows import IGNORED

Tokens = Tensor | Sequence[int]


@dataclass(frozen=True, eq=False)
class Responses:
    """B prompts with a response each: `ids` int64 [B, T], every row a prompt, its response and
    padding; `mask` bool [B, T], True = a token of the response, its first end-of-text token
    included and nothing after it; `prompt_length` int64 [B]."""

    ids: Tensor
    mask: Tensor
    prompt_length: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> Responses:
        """From prompts and responses of their own lengths. Raises ValueError for an empty prompt,
        and where there are not as many responses as prompts."""
        prompts, responses = tokens(prompts), [_ids(each) for each in responses]
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses")
        whole = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
        start, end = (_lengths(rows, ids.device) for rows in (prompts, whole))
        place = torch.arange(ids.shape[1], device=ids.device)
        return cls(ids, (place >= start[:, None]) & (place < end[:, None]), start)

    @property
    def length(self) -> Tensor:
        """Tokens of prompt and response, int64 [B]."""
        return self.prompt_length + self.mask.sum(1)

    def prompts(self) -> list[Tensor]:
        """The prompts, int64 [n] each."""
        return [row[:n] for row, n in zip(self.ids, self.prompt_length.tolist(), strict=True)]

    def responses(self) -> list[Tensor]:
        """The responses, int64 [n] each."""
        return [row[mask] for row, mask in zip(self.ids, self.mask, strict=True)]

    def part(self, rows: slice | Tensor) -> Responses:
        """Some of them, as wide as the longest of these needs."""
        ids, mask, start = (x[rows] for x in (self.ids, self.mask, self.prompt_length))
        width = int((start + mask.sum(1)).max()) if len(ids) else 0
        return Responses(ids[:, :width], mask[:, :width], start)

    def batch(self) -> dict[str, Tensor]:
        """The language-model batch whose targets are the responses: `input_ids`, `attention_mask`,
        `labels` (-100 = not a target), padded on the right."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        return {
            "input_ids": self.ids,
            "attention_mask": (place < self.length[:, None]).long(),
            "labels": self.ids.masked_fill(~self.mask, IGNORED),
        }

    def to(self, device: Any) -> Responses:
        """The same on another device."""
        return Responses(*(x.to(device) for x in (self.ids, self.mask, self.prompt_length)))


def rollout(
    model: Any,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Tensor,
    eos_token_id: int | Iterable[int] | None = None,
) -> Responses:
    """A response of at most `max_new_tokens` tokens to each prompt, drawn from the model.

    model: a causal language model of transformers, which generates with its cache and the prompts
    padded on the left; an encoder-decoder, which encodes them; or any callable that maps ids [B, T]
    to logits [B, T, V], where a token's logits depend on nothing to its right. It is put in
    evaluation mode and back again, and asked for no gradient. What its generation config says about
    sampling does not count.
    prompts: token ids, one sequence each, of any lengths. temperature 0 takes the likeliest token.
    top_k and top_p as in transformers, in that order. seed: an int, or int64 [B] with one a row;
    a row's numbers depend on its seed and the token's place alone, not on the batch around it. With
    an int row b has the same seed in a batch of any size. eos_token_id: what ends a response; None:
    the model's own, () nothing.

    The draw inverts the cumulated float64 probabilities at a uniform of 53 bits. Raises ValueError
    for empty prompts, numbers out of range, a prompt without room for its response, an
    encoder-decoder without a start token, and logits that are not finite.

    Example:
        >>> import torch
        >>> from stillhouse.train import rollout
        >>> def counts(ids):  # always says the next number
        ...     return 50 * torch.nn.functional.one_hot((ids + 1) % 7, 7).float()
        >>> drawn = rollout(counts, [[1], [3, 4]], max_new_tokens=3, seed=0, eos_token_id=6)
        >>> [each.tolist() for each in drawn.responses()]
        [[2, 3, 4], [5, 6]]
    """
    prompts = tokens(prompts)
    if not prompts:
        raise ValueError("there is no prompt to respond to")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    parameter = next(getattr(model, "parameters", lambda: iter(()))(), None)
    device = prompts[0].device if parameter is None else parameter.device
    uniforms = _uniforms(seed, len(prompts), max_new_tokens)
    draw = _Draw(uniforms.to(device), temperature, top_k, top_p)
    prompts = [each.to(device) for each in prompts]
    is_language_model = callable(getattr(model, "generate", None))
    generate = _generated if is_language_model else _plain
    ends = end_tokens(model, eos_token_id)
    with torch.no_grad(), evaluating(model):
        drawn = generate(model, prompts, max_new_tokens, draw, ends)
    return Responses.of(prompts, [_cut(row, ends) for row in drawn])


def tokens(prompts: Sequence[Tokens]) -> list[Tensor]:
    """Prompts as int64 [n] each. Raises ValueError for an empty one."""
    result = [_ids(each) for each in prompts]
    empty = [number for number, each in enumerate(result) if not len(each)]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty: nothing would predict its first token")
    return result


class _Draw:
    """The next token of each row from its logits [B, V]."""

    def __init__(
        self, uniforms: Tensor, temperature: float, top_k: int | None, top_p: float | None
    ):
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be a number >= 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        self.uniforms, self.temperature = uniforms, temperature
        self.warpers: list[Callable[[Any, Tensor], Tensor]] = []
        if top_k is not None or top_p is not None:
            from transformers import TopKLogitsWarper, TopPLogitsWarper

            self.warpers += [] if top_k is None else [TopKLogitsWarper(top_k)]
            self.warpers += [] if top_p is None else [TopPLogitsWarper(top_p)]

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        scores = logits.double() / self.temperature
        for warper in self.warpers:
            scores = warper(None, scores)
        cumulated = scores.softmax(-1).cumsum(-1)
        total = cumulated[:, -1:]
        if not total.isfinite().all():
            raise ValueError(f"a model's logits are not finite at token {step} of its response")
        threshold = self.uniforms[:, step, None] * total
        return torch.searchsorted(cumulated, threshold, right=True)[:, 0]


def _generated(
    model: Any, prompts: list[Tensor], count: int, draw: _Draw, ends: list[int]
) -> list[Tensor]:
    """What transformers generates where the draw is ours."""
    from transformers import GenerationConfig

    encodes = bool(getattr(model.config, "is_encoder_decoder", False))
    width = max(map(len, prompts))
    _check_room(model, width, count, apart=encodes)

    def padded(row: Tensor) -> Tensor:  # any token will do: what is padded is masked
        room = width - len(row)
        return torch.nn.functional.pad(row, (0, room) if encodes else (room, 0))

    # What a response stands behind: the decoder's start token, or the prompt.
    before = 1 if encodes else width
    start = _decoder_start(model) if encodes else None

    def chosen(ids: Tensor, logits: Tensor) -> Tensor:
        token = draw(logits, ids.shape[1] - before)
        return torch.full_like(logits, float("-inf")).scatter(1, token[:, None], 0.0)

    # A penalty or a forced token of the model's own config would be another distribution. Adapters
    # hand theirs to the model below.
    holders = [model, getattr(model, "get_base_model", lambda: model)()]
    own = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        neutral = GenerationConfig(
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=0,
            decoder_start_token_id=start,
        )
        out = model.generate(
            input_ids=torch.stack([padded(each) for each in prompts]),
            attention_mask=torch.stack([padded(torch.ones_like(each)) for each in prompts]),
            generation_config=neutral,
            logits_processor=[chosen],
        )
    finally:
        for holder, config in zip(holders, own, strict=True):
            holder.generation_config = config
    return list(out[:, before:])


def _check_room(model: Any, width: int, count: int, *, apart: bool) -> None:
    """Raise ValueError where prompt and response need more positions than the model has; `apart`:
    each of them has its own."""
    positions = getattr(model.config, "max_position_embeddings", None)
    needed = max(width, count) if apart else width + count
    if positions is not None and needed > positions:
        raise ValueError(
            f"a prompt of {width} and a response of {count} tokens are more than the model's "
            f"{positions} positions"
        )


def _decoder_start(model: Any) -> int:
    """The token that a decoder begins with."""
    for holder in (model.generation_config, model.config):
        token = getattr(holder, "decoder_start_token_id", None)
        if token is not None:
            return token
    raise ValueError(f"{type(model).__name__} has no decoder_start_token_id in its config")


def _plain(
    model: Callable[[Tensor], Any], prompts: list[Tensor], count: int, draw: _Draw, ends: list[int]
) -> list[Tensor]:
    """The same of a callable: no cache, and padded on the right, which a causal one cannot see."""
    room = prompts[0].new_zeros(count)
    padded = [torch.cat([each, room]) for each in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(padded, batch_first=True)
    start = _lengths(prompts, ids.device)
    rows = torch.arange(len(ids), device=ids.device)
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for step in range(count):
        end = start + step
        logits = plain_logits(model, ids[:, : int(end.max())])[rows, end - 1]
        token = draw(logits, step)
        ids[rows, end] = token
        if ends:
            finished |= torch.isin(token, token.new_tensor(ends))
            if finished.all():
                break
    return [row[n : n + count] for row, n in zip(ids, start.tolist(), strict=True)]


def _cut(row: Tensor, ends: list[int]) -> Tensor:
    """A response up to its first end-of-text token."""
    found = torch.isin(row, row.new_tensor(ends)).nonzero()
    return row[: int(found[0]) + 1] if len(found) else row


def end_tokens(model: Any, given: int | Iterable[int] | None = None) -> list[int]:
    """What ends a response: `given`, or else what the model's configs say."""
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        if given is None:
            given = getattr(holder, "eos_token_id", None)
    return [given] if isinstance(given, int) else list(given or ())


def _uniforms(seed: int | Tensor, rows: int, count: int) -> Tensor:
    """float64 [rows, count] in [0, 1), each row from a generator of its own."""
    if isinstance(seed, int):
        generator = torch.Generator().manual_seed(seed)
        seed = torch.randint(2**62, (rows,), generator=generator)
    if seed.shape != (rows,):
        raise ValueError(f"seed must be an int or one for each of {rows} prompts")
    generators = [torch.Generator().manual_seed(each) for each in seed.tolist()]
    options = dict(dtype=torch.float64)
    return torch.stack([torch.rand(count, generator=each, **options) for each in generators])


def _ids(tokens: Tokens) -> Tensor:
    ids = torch.as_tensor(tokens, dtype=torch.int64)
    if ids.dim() != 1:
        raise ValueError(f"token ids must be one sequence [n], got shape {tuple(ids.shape)}")
    return ids


def _lengths(rows: list[Tensor], device: Any) -> Tensor:
    return torch.tensor([len(each) for each in rows], device=device)
