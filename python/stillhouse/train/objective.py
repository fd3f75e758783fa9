"""What a language-model distillation loss sees, and the plain divergence as such a loss.

An objective is any callable `objective(student, teacher, batch) -> dict` whose "loss" is the
total and whose other tensors are logged (the same names on every rank). `student` and `teacher`
are `LogitRows` (the teacher may be None, or an `ops.SparseTeacher`), `batch` the dict of the
language-model batch plus `denominator`, the global number of supervised tokens, and `vocab_size`,
the columns that count (None = all). It is called inside the student's forward, where the output
head's weights are whole even if they are sharded. Optional methods:
`update(stats, step, total_steps)`, called once per optimiser step with the loss averaged over
micro-batches and ranks; `state_dict` / `load_state_dict`; `parameters`;
`use_tokenizer(tokenizer)`, which `stillhouse distill` calls before it trains;
`use_student(model)`, which `DistillTrainer` calls at first and `Taught` before each forward;
`revise(student, teacher, responses, *, seed, **sampling)`, what it makes of responses that the
student has drawn while training (`train.OnPolicy`), before they are used; sampling are
`rollout`'s options. An objective that needs no teacher says so with `needs_teacher = False`, one
whose batches are pairs of responses with `needs_pairs = True`, one that takes sparse teachers says
with which tails: `sparse_tails`; and one that may have drawn columns, because it is linear in the
teacher: `takes_draws`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.train.head import Head
from stillhouse.train.rows import RowIndex, paired


class LogitRows:
    """The N supervised rows of one model's forward.

    Either `given`, logits [N, V] that belong to this object alone, so that a gradient may be
    written over them; or `hidden` [N, H], what the output head saw, and that `head`: then logits
    exist only where somebody asks for them. `index` says which row is which, `hidden_states` is
    the model's own tuple of [B, T, H] where the forward was asked for it.
    """

    def __init__(
        self,
        given: Tensor | None,
        index: RowIndex,
        hidden: Tensor | None = None,
        head: Head | None = None,
        hidden_states: tuple[Tensor, ...] | None = None,
    ):
        self.given, self.index, self.hidden, self.head = given, index, hidden, head
        self.hidden_states = hidden_states

    def __len__(self) -> int:
        return self.index.row.numel()

    @property
    def logits(self) -> Tensor:
        """[N, V]; made anew, differentiably, each time where there is a head."""
        return self.head.logits(self.hidden) if self.given is None else self.given

    def part(self, rows: slice) -> LogitRows:
        """Some of the rows, without hidden states of whole sequences."""
        given, hidden = (None if x is None else x[rows] for x in (self.given, self.hidden))
        return LogitRows(given, RowIndex(*(x[rows] for x in self.index)), hidden, self.head)


Teacher = LogitRows | ops.SparseTeacher | None
Objective = Callable[[LogitRows, Teacher, Mapping[str, Any]], dict[str, Tensor]]


def row_divergence(
    student: LogitRows, teacher: Teacher, kind: Any = "forward_kl", **options: Any
) -> Tensor:
    """`ops.divergence` of each supervised row: float32 [N], differentiable; with the student's
    head at hand `ops.linear_divergence`, which makes logits by the chunk only.

    `options` are theirs, but for what belongs to the heads. Raises ValueError where the rows of
    student and teacher do not predict the same tokens.
    """
    return _divergence(student, teacher, kind, "divergence", options)


def row_loss(
    student: LogitRows,
    teacher: Teacher,
    kind: Any,
    batch: Mapping[str, Any],
    *,
    label_weight: float = 0.0,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
) -> tuple[Tensor, ops.Stats]:
    """(1 - label_weight) * D + label_weight * CE(target), summed over rows / `denominator`.

    Returns the scalar and the per-row statistics of the same pass. Logits that the student's rows
    were given must not be read afterwards: while training the gradient is written over them.
    Without `batch["denominator"]` the mean is over this batch's rows; `batch["vocab_size"]` leaves
    padded columns out.
    """
    is_labelled = label_weight != 0 or ops.as_kind(kind).needs_labels
    options = {
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "labels": student.index.target if is_labelled else None,
        "label_weight": label_weight,
        "denominator": batch.get("denominator"),
        "vocab_size": batch.get("vocab_size"),
        "return_stats": True,
    }
    return _divergence(student, teacher, kind, "divergence_loss", options)


def _divergence(
    student: LogitRows, teacher: Teacher, kind: Any, op: str, options: dict[str, Any]
) -> Any:
    """`ops.linear_<op>` where the student's head can be taken apart, else `ops.<op>`."""
    if isinstance(teacher, LogitRows):
        paired(student.index, teacher.index)
    heads = [rows.head for rows in (student, teacher) if isinstance(rows, LogitRows)]
    # A sparse teacher has no logits that something could be done to.
    scales = tuple(1.0 if head is None else head.scale for head in (*heads, None)[:2])
    caps = tuple(None if head is None else head.softcap for head in (*heads, None)[:2])
    own = {"logit_scale": scales, "logit_softcap": caps}
    if own.keys() & options.keys():
        raise TypeError("logit_scale and logit_softcap are known from the models' heads")
    options |= own
    linear = None if student.head is None else student.head.linear()
    if linear is not None:
        weight, bias = linear
        other = _linear_teacher(teacher)
        function = getattr(ops, f"linear_{op}")
        return function(student.hidden, weight, other, kind, student_bias=bias, **options)
    logits = student.given if student.head is None else student.head.forward(student.hidden)
    other = teacher
    if isinstance(teacher, LogitRows):
        other = teacher.given if teacher.head is None else teacher.head.forward(teacher.hidden)
    if op == "divergence_loss":
        options["inplace_grad"] = torch.is_grad_enabled() and logits.requires_grad
    return getattr(ops, op)(logits, other, kind, **options)


def _linear_teacher(teacher: Teacher) -> Any:
    if not isinstance(teacher, LogitRows):
        return teacher
    if teacher.head is None:
        return teacher.given
    linear = teacher.head.linear()
    if linear is None:
        return teacher.head.forward(teacher.hidden)
    return ops.LinearTeacher(teacher.hidden, *linear)


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
        self.sparse_tails = self.kind.sparse_tails
        self.takes_draws = self.kind.linear_in_teacher

    def __call__(
        self, student: LogitRows, teacher: Teacher, batch: Mapping[str, Any]
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
