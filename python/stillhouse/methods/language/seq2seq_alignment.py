"""The same answer in a decoder-only teacher and in an encoder-decoder: which row is which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stillhouse.train import Responses, RowIndex, paired, supervised_rows
from stillhouse.train.responses import Tokens
from stillhouse.train.rows import IGNORED

Side = Literal["right", "left"]


class Inputs(NamedTuple):
    """Keyword arguments of either model: `input_ids`, `attention_mask`, `decoder_input_ids` of the
    student, `input_ids`, `attention_mask`, where needed `position_ids` of the teacher."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]


def align_seq2seq(
    source: Sequence[Tokens],
    target: Sequence[Tokens],
    *,
    decoder_start_token_id: int,
    teacher_prefix: Sequence[Tokens] | None = None,
    side: Side = "right",
    longest: tuple[int, int] | None = None,
    vocab_size: int | None = None,
    unknown_token_id: int | None = None,
) -> tuple[RowIndex, RowIndex, Inputs]:
    """Rows that predict the targets in the student and in the teacher, and what to feed them.

    source, target: token ids, B sequences each, of any lengths; a target's end-of-text token is
    part of it, a start token is not. The student's encoder reads the source, its decoder the start
    token and the target; the teacher reads prefix and target in one, where the prefix is the source
    or, with a template around it, `teacher_prefix`. Row t of a student's sequence and row
    len(prefix) - 1 + t of the teacher's predict target t; nothing else has a row.

    side: where prefixes of unlike lengths are padded. "right" pads behind the target, and any
    causal teacher can be asked; "left" makes the targets begin in one column, which needs masks and
    `position_ids`. longest: tokens that a source and a target may have at most. vocab_size: ids
    from there on, which a student with padded columns can draw, become `unknown_token_id`.
    Raises ValueError for an empty source, target or prefix, one too long, as many of one as not of
    the other, an unknown side, and ids outside `vocab_size` where there is no unknown token.

    Defaults: padding on the right; the authors pad prefixes on the left to one length and drop a
    source's surplus there. Cut a source before it comes here, so that both models read the same.

    Example:
        >>> from stillhouse.methods.language import align_seq2seq
        >>> student, teacher, inputs = align_seq2seq(
        ...     [[5, 6], [7]], [[8, 2], [9, 3, 2]], decoder_start_token_id=1
        ... )
        >>> inputs.teacher["input_ids"].tolist()
        [[5, 6, 8, 2], [7, 9, 3, 2]]
        >>> teacher.row.tolist(), inputs.student["decoder_input_ids"].tolist()
        ([1, 2, 4, 5, 6], [[1, 8, 2], [1, 9, 3]])
    """
    if side not in ("right", "left"):
        raise ValueError(f"side must be 'right' or 'left', got {side!r}")
    most = longest or (None, None)
    source, target = _rows("source", source, most[0]), _rows("target", target, most[1])
    prefix = source if teacher_prefix is None else _rows("teacher_prefix", teacher_prefix)
    if not len(source) == len(target) == len(prefix):
        raise ValueError(
            f"{len(source)} sources, {len(target)} targets and {len(prefix)} prefixes: "
            "one of each makes an example"
        )
    if vocab_size is not None:
        target = [_within(each, vocab_size, unknown_token_id) for each in target]

    width = max(map(len, prefix)) if side == "left" else 0
    room = torch.tensor([max(width - len(each), 0) for each in prefix])
    before = [p.new_zeros(n) for n, p in zip(room.tolist(), prefix, strict=True)]
    padded = [torch.cat(pair) for pair in zip(before, prefix, strict=True)]
    teacher = Responses.of(padded, target).batch()
    other = supervised_rows(teacher.pop("labels"))
    if side == "left":
        place = torch.arange(teacher["input_ids"].shape[1]) - room[:, None]
        teacher["attention_mask"] *= place >= 0
        teacher["position_ids"] = place.clamp(min=0)

    y = pad_sequence(target, batch_first=True, padding_value=IGNORED)
    sequence, position = (y != IGNORED).nonzero(as_tuple=True)
    index = RowIndex(sequence * y.shape[1] + position, y[sequence, position], sequence)
    shifted = torch.nn.functional.pad(y[:, :-1], (1, 0), value=decoder_start_token_id)
    student = {
        "input_ids": pad_sequence(source, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in source], batch_first=True),
        "decoder_input_ids": shifted.masked_fill(shifted == IGNORED, 0),
    }
    paired(index, other)
    return index, other, Inputs(student, teacher)


def _rows(name: str, given: Sequence[Tokens], most: int | None = None) -> list[Tensor]:
    rows = [torch.as_tensor(each, dtype=torch.int64).cpu() for each in given]
    for number, each in enumerate(rows):
        if each.dim() != 1 or not len(each):
            found = tuple(each.shape)
            raise ValueError(f"{name} {number} must be token ids [n], n >= 1, got shape {found}")
        if most is not None and len(each) > most:
            raise ValueError(f"{name} {number} has {len(each)} tokens, at most {most} are allowed")
    if not rows:
        raise ValueError(f"there is no {name}")
    return rows


def _within(ids: Tensor, vocab_size: int, unknown: int | None) -> Tensor:
    outside = ids >= vocab_size
    if unknown is None and bool(outside.any()):
        raise ValueError(
            f"a target has token {int(ids.max())}, the vocabulary {vocab_size}: pass "
            "unknown_token_id= for what the tokenizer does not know"
        )
    return ids if unknown is None else ids.masked_fill(outside, unknown)
