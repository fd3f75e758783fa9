"""Which positions of a batch are supervised, and what each of them predicts.

The one place of the library that shifts: row i of `labels` predicts label i + 1.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

IGNORED = -100


class RowIndex(NamedTuple):
    """N supervised rows of a batch [B, T], in reading order; three int64 tensors of shape [N].

    `row` is the position in the batch flattened to [B * T], `target` the token that the row
    predicts, `sequence` the batch item it belongs to.
    """

    row: Tensor
    target: Tensor
    sequence: Tensor


def supervised_rows(labels: Tensor) -> RowIndex:
    """Rows of `labels` (int64 [B, T], -100 = not a target) whose next label counts.

    The first label of a sequence has no row that predicts it, so it is never a target. An empty
    selection is legal. Raises ValueError for a tensor that is not [B, T].
    """
    if labels.dim() != 2:
        raise ValueError(
            f"labels must be [batch, tokens], got shape {tuple(labels.shape)}; "
            "a single sequence needs labels[None]"
        )
    sequence, position = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return RowIndex(
        row=sequence * labels.shape[1] + position,
        target=labels[sequence, position + 1],
        sequence=sequence,
    )


def paired(student: RowIndex, teacher: RowIndex) -> None:
    """Raise ValueError unless both indices select the same targets in the same order.

    Student and teacher may see different inputs (a longer prompt, another padding), so the rows
    themselves may differ; what they predict may not.
    """
    if student is teacher:
        return
    n_student, n_teacher = student.target.numel(), teacher.target.numel()
    if n_student != n_teacher:
        raise ValueError(
            f"student has {n_student} supervised rows and teacher {n_teacher}: "
            "both must be masked to the same response tokens"
        )
    differs = (student.target != teacher.target) | (student.sequence != teacher.sequence)
    if bool(differs.any()):
        first = int(differs.nonzero()[0])
        raise ValueError(
            f"supervised row {first} predicts token {int(student.target[first])} in the student "
            f"and {int(teacher.target[first])} in the teacher: the two batches are not aligned"
        )
