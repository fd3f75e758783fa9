"""Output heads of two widths: the columns that both have, and what a teacher says of the others."""

from __future__ import annotations

import torch

from stillhouse.train import LogitRows
from stillhouse.train.objective import Teacher

ROWS = 256  # rows whose logits exist at a time


def shared_columns(
    student: LogitRows,
    teacher: Teacher,
    vocab_size: int | None = None,
    *,
    temperature: float = 1.0,
    most: float = 1e-4,
) -> int | None:
    """The number of columns that count: `vocab_size`, or else the narrower head's; None where
    nothing is left out.

    Raises ValueError where that leaves out more than `most` of the teacher's probability in a row.
    A sparse teacher knows its own columns.
    """
    if not isinstance(teacher, LogitRows):
        return vocab_size
    ours, theirs = _width(student), _width(teacher)
    columns = vocab_size or min(ours, theirs)
    if columns < theirs:
        lost = _mass_behind(teacher, columns, temperature)
        if not lost <= most:
            raise ValueError(
                f"the teacher has {lost:.2g} of a row's mass in columns {columns} to "
                f"{theirs - 1}, which do not count: at most {most:g} may be left out"
            )
    return columns if columns < max(ours, theirs) else None


def _width(rows: LogitRows) -> int:
    return rows.given.shape[-1] if rows.head is None else rows.head.module.weight.shape[0]


@torch.no_grad()
def _mass_behind(teacher: LogitRows, columns: int, temperature: float) -> float:
    """The largest probability of the columns from `columns` on, over rows."""
    starts = range(0, len(teacher), ROWS)
    parts = (teacher.part(slice(start, start + ROWS)).logits for start in starts)
    lost = [(x.float() / temperature).softmax(-1)[:, columns:].sum(-1).max() for x in parts]
    return max((each.item() for each in lost), default=0.0)
