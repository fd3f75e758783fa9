"""What a language-model distillation loss sees, and the plain divergence as such a loss.

An objective is any callable `objective(student, teacher, batch) -> dict` whose "loss" is the
total and whose other tensors are logged (the same names on every rank). `student` and `teacher`
are `LogitRows` (the teacher may be None), `batch` the dict of the language-model batch plus
`denominator`, the global number of supervised tokens, and `vocab_size`, the columns that count
(None = all). Optional methods:
`update(stats, step, total_steps)`, called once per optimiser step with the loss averaged over
micro-batches and ranks; `state_dict` / `load_state_dict`; `parameters`. An objective that needs no
teacher says so with `needs_teacher = False`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import ops
from stillhouse.train.rows import RowIndex, paired

Objective = Callable[["LogitRows", "LogitRows | None", Mapping[str, Any]], dict[str, Tensor]]


@dataclass
class LogitRows:
    """The supervised rows of one model's forward.

    `logits` [N, V] belong to this object alone, so a gradient may be written over them. `index`
    says which row is which. `hidden` [N, H] is what the output head saw, `head` that head, and
    `hidden_states` the model's own tuple of [B, T, H] where the forward was asked for it.
    """

    logits: Tensor
    index: RowIndex
    hidden: Tensor | None = None
    head: nn.Module | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def row_divergence(
    student: LogitRows, teacher: LogitRows | None, kind: Any = "forward_kl", **options: Any
) -> Tensor:
    """`ops.divergence` of each supervised row: float32 [N], differentiable, logits untouched.

    `options` go to `ops.divergence`. Raises ValueError where the rows of student and teacher do
    not predict the same tokens.
    """
    return ops.divergence(student.logits, _teacher_logits(student, teacher), kind, **options)


def row_loss(
    student: LogitRows,
    teacher: LogitRows | None,
    kind: Any,
    batch: Mapping[str, Any],
    *,
    label_weight: float = 0.0,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
) -> tuple[Tensor, ops.Stats]:
    """(1 - label_weight) * D + label_weight * CE(target), summed over rows / `denominator`.

    Returns the scalar and the per-row statistics of the same pass. While training the gradient is
    written over `student.logits`, which must not be read afterwards. Without
    `batch["denominator"]` the mean is over this batch's rows; `batch["vocab_size"]` leaves padded
    columns out.
    """
    is_labelled = label_weight != 0 or ops.as_kind(kind).needs_labels
    return ops.divergence_loss(
        student.logits,
        _teacher_logits(student, teacher),
        kind,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        labels=student.index.target if is_labelled else None,
        label_weight=label_weight,
        denominator=batch.get("denominator"),
        vocab_size=batch.get("vocab_size"),
        inplace_grad=torch.is_grad_enabled() and student.logits.requires_grad,
        return_stats=True,
    )


def _teacher_logits(student: LogitRows, teacher: LogitRows | None) -> Tensor | None:
    if teacher is None:
        return None
    paired(student.index, teacher.index)
    return teacher.logits


class DivergenceObjective:
    """One divergence between student and teacher rows, optionally mixed with the label loss.

    `kind` is anything `ops.as_kind` takes; `temperature` divides both sides unless
    `teacher_temperature` is given, and no T^2 factor is added. `ops.CrossEntropy` needs no
    teacher: it is plain fine-tuning, the control of every distillation run.
    """

    def __init__(
        self,
        kind: Any = "forward_kl",
        *,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        label_weight: float = 0.0,
    ):
        if not 0.0 <= label_weight <= 1.0:
            raise ValueError(f"label_weight is a share in [0, 1], got {label_weight}")
        self.kind = ops.as_kind(kind)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.label_weight = label_weight
        self.needs_teacher = not isinstance(self.kind, ops.CrossEntropy)

    def __call__(
        self, student: LogitRows, teacher: LogitRows | None, batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """`loss` (scalar with a gradient) and the detached means of the row statistics."""
        loss, stats = row_loss(
            student,
            teacher if self.needs_teacher else None,
            self.kind,
            batch,
            label_weight=self.label_weight,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
        )
        return {"loss": loss, **row_means(stats, with_teacher=self.needs_teacher)}


def row_means(stats: ops.Stats, *, with_teacher: bool = True) -> dict[str, Tensor]:
    """The statistics worth logging, averaged over rows (0 for a batch without rows)."""
    names = ("student_entropy",)
    if with_teacher:
        names = ("acceptance", "agreement", "student_entropy", "teacher_entropy")
    # A batch may have no supervised row: the mean of nothing would be NaN.
    rows = max(getattr(stats, names[0]).numel(), 1)
    return {name: getattr(stats, name).detach().sum() / rows for name in names}
