"""From text to batches: tokens, what in them is supervised, packing, padding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stillhouse.data.text import layout
from stillhouse.train.rows import IGNORED


@dataclass(frozen=True)
class Example:
    """One sequence: `input_ids` int32 [n], `loss_mask` bool [n] (True = a target, except for the
    first token, which nothing predicts), `record` the number of the record it begins in; `teacher`
    a stored one at the supervised rows (`teachers.StoredRows`). `prefix_length`: so many tokens are
    given, and may see each other; `document_ids` int32 [n]: which document each token is of."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    record: int = -1
    teacher: Any = None
    prefix_length: int | None = None
    document_ids: np.ndarray | None = None


class ExampleSet(Dataset):
    """A list of examples as a map-style dataset, with how many of them carry a target."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @property
    def targets(self) -> int:
        """Number of supervised tokens."""
        return sum(int(example.loss_mask[1:].sum()) for example in self.examples)


def encode(
    records: Sequence[Mapping[str, Any]],
    numbers: Iterable[int],
    tokenizer: Any,
    max_length: int,
) -> ExampleSet:
    """Examples of `records[number]` for each of `numbers`, at most `max_length` tokens each.

    `text` is packed: documents one after the other, each followed by the end-of-text token, cut
    into windows. `messages` and `prompt` / `response` give one example a record, through the chat
    template, with everything but the assistant's turns masked; records without a target are left
    out. Raises ValueError where nothing supervised remains.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, got {max_length}")
    numbers = list(numbers)
    if numbers and layout(records[numbers[0]]) == ("text",):
        separator = tokenizer.eos_token_id
        documents = (
            (number, tokenizer(_string(records, number, "text"), **PLAIN)["input_ids"])
            for number in numbers
        )
        examples = pack(documents, max_length, separator=separator)
    else:
        examples = []
        for number in numbers:
            try:
                example = _conversation(records, number, tokenizer, max_length)
            except Exception as error:  # a template raises what its author thought of
                reason = " ".join(str(error).split())
                raise ValueError(f"record {number} cannot be encoded: {reason}") from error
            if example.loss_mask[1:].any():
                examples.append(example)
    result = ExampleSet(examples)
    if not result.targets:
        raise ValueError(
            f"the data is empty: {len(numbers)} records gave no supervised token within "
            f"{max_length} tokens (--max_length)"
        )
    return result


# Long documents are cut here, so the tokenizer's warning about its model's length means nothing.
PLAIN = {"add_special_tokens": False, "verbose": False}


def pack(
    documents: Iterable[tuple[int, Sequence[int]]],
    length: int,
    *,
    separator: int | None = None,
    keep_documents: bool = False,
) -> list[Example]:
    """Windows of `length` tokens over the documents (record number, token ids) end to end, the
    last one shorter; `separator` is put after each document. Every token is a target. With
    `keep_documents` the examples say which document each token is of, counted from 0 in each."""
    ids: list[int] = []
    starts: list[tuple[int, int]] = []  # (position in the stream, record number)
    for number, tokens in documents:
        starts.append((len(ids), number))
        ids.extend(tokens)
        if separator is not None:
            ids.append(separator)
    stream = np.asarray(ids, dtype=np.int32)
    positions = np.asarray([position for position, _ in starts])
    examples = []
    for begin in range(0, len(stream), length):
        window = stream[begin : begin + length]
        of = np.searchsorted(positions, np.arange(begin, begin + len(window)), side="right") - 1
        documents = (of - of[0]).astype(np.int32) if keep_documents else None
        mask = np.ones(len(window), dtype=bool)
        examples.append(Example(window, mask, starts[of[0]][1], document_ids=documents))
    return examples


def chat_example(
    messages: Sequence[Mapping[str, str]],
    tokenizer: Any,
    *,
    template: str | None = None,
    max_length: int | None = None,
    record: int = -1,
) -> Example:
    """A conversation through the chat template; only what the assistant says is a target.

    The end-of-turn tokens after an assistant's turn are targets too. With `max_length`, exchanges
    at the end that do not fit are dropped; a first exchange that does not fit is cut. Raises
    ValueError for a tokenizer without template or offsets, and for a template that rewrites
    earlier turns (its turns cannot be told apart).
    """
    if template is None and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "the tokenizer has no chat template, which messages need: set one, or give text"
        )
    if not tokenizer.is_fast:
        raise ValueError("masking turns needs a fast tokenizer, one that reports offsets")

    def render(turns: Sequence[Mapping[str, str]], prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=prompt, chat_template=template
        )

    last = len(messages)
    while True:
        kept = messages[:last]
        text, spans = render(kept), []
        for turn, message in enumerate(kept):
            # What opens a conversation answers nothing: it stays context.
            if turn and message["role"] == "assistant":
                before, after = render(kept[:turn], prompt=True), render(kept[: turn + 1])
                if not (after.startswith(before) and text.startswith(after)):
                    raise ValueError(
                        f"the chat template rewrites turn {turn} when later turns follow: "
                        "give such conversations as prompt and response"
                    )
                spans.append((len(before), len(after)))
        encoded = tokenizer(text, return_offsets_mapping=True, **PLAIN)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        earlier = [turn for turn in range(1, last - 1) if messages[turn]["role"] == "assistant"]
        if max_length is None or len(ids) <= max_length or not earlier:
            break
        last = earlier[-1] + 1  # without the last exchange
    mask = [any(begin <= start < end for begin, end in spans) for start, _ in offsets]
    return Example(
        np.asarray(ids[:max_length], dtype=np.int32),
        np.asarray(mask[:max_length], dtype=bool),
        record,
    )


# A batch's stored teacher, in the order of `teachers.StoredRows`.
STORED = ("teacher_ids", "teacher_log_probs", "teacher_log_rest")


def collate(examples: Sequence[Example], *, padding: int = 0) -> dict[str, Tensor]:
    """A batch: `input_ids`, `attention_mask`, `labels` int64 [B, T] (-100 = not a target), and
    `record` int64 [B]. Padded on the right with the token `padding`. Of N rows of stored teachers
    `teacher_ids`, `teacher_log_probs` [N, k] and `teacher_log_rest` [N], in reading order. Where an
    example has them, `prefix_length` int64 [B] (0 = none) and `document_ids` int64 [B, T] (-1 =
    padding): attention masks are the caller's to make of them."""
    length = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), length), padding, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORED)
    attention_mask = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        ids = torch.from_numpy(example.input_ids.astype(np.int64))
        input_ids[row, :n] = ids
        attention_mask[row, :n] = 1
        labels[row, :n] = ids.masked_fill(~torch.from_numpy(example.loss_mask), IGNORED)
    # Nothing predicts the first token, so it never counts, whoever counts the labels.
    labels[:, 0] = IGNORED
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "record": torch.tensor([example.record for example in examples]),
    }
    if any(example.prefix_length is not None for example in examples):
        batch["prefix_length"] = torch.tensor([each.prefix_length or 0 for each in examples])
    if any(example.document_ids is not None for example in examples):
        documents = torch.full_like(input_ids, -1)
        for row, example in enumerate(examples):
            known, n = example.document_ids, len(example.input_ids)
            documents[row, :n] = 0 if known is None else torch.from_numpy(known.astype(np.int64))
        batch["document_ids"] = documents
    if examples[0].teacher is not None:
        parts = zip(*(example.teacher for example in examples), strict=True)
        batch |= zip(STORED, map(torch.cat, parts), strict=True)
    return batch


def _string(records: Sequence[Mapping[str, Any]], number: int, column: str) -> str:
    value = records[number][column]
    if not isinstance(value, str):
        raise ValueError(f"{column} of record {number} is {type(value).__name__}, not text")
    return value


def _conversation(
    records: Sequence[Mapping[str, Any]], number: int, tokenizer: Any, max_length: int
) -> Example:
    record = records[number]
    if layout(record) == ("messages",):
        if not isinstance(record["messages"], list) or not record["messages"]:
            raise ValueError("messages must be a list of at least one message")
        return chat_example(record["messages"], tokenizer, max_length=max_length, record=number)
    prompt, response = (_string(records, number, column) for column in ("prompt", "response"))
    if getattr(tokenizer, "chat_template", None) is not None:
        turns = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response},
        ]
        return chat_example(turns, tokenizer, max_length=max_length, record=number)
    # A base model has no template: the response follows the prompt and ends the text.
    head = tokenizer(prompt, **PLAIN)["input_ids"]
    tail = tokenizer(response, **PLAIN)["input_ids"]
    if tokenizer.eos_token_id is not None:
        tail = [*tail, tokenizer.eos_token_id]
    ids = np.asarray((head + tail)[:max_length], dtype=np.int32)
    return Example(ids, np.arange(len(ids)) >= len(head), number)
