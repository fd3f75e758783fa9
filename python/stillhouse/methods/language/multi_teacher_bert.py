"""Several teachers of one student, and how loyal the student is to each.

Two monolingual BERTs and their ensemble are compressed into students of half the depth (blocks
0, 2, 4, 7, 9 and 11 of twelve: `take_layers`), by DistilBERT's recipe: rare words are masked first,
and three losses are added, 5 (soft labels) + 2 (labels) + 1 (cosine of last hidden states).

Equation, p_k = softmax(T_k / tau) the teachers', q = softmax(z / tau) the student's, weights w:

    L_ce = tau^2 sum_k w_k KL(p_k || q) = tau^2 [KL(p || q) + JSD_w(p_1 .. p_K)],  p = sum_k w_k p_k
    dL_ce / dz = tau (q - p)

Paper: Distilling the Knowledge of Romanian BERTs Using Multiple Teachers, LREC 2022,
arXiv 2112.12650. Code by its authors: racai-ai/Romanian-DistilBERT, which evaluates; the training
is DistilBERT's.

How the paper brought two vocabularies together is not said, nor its formula of regression loyalty:
both are our reading. The weights 5, 2, 1 are those of DistilBERT's published runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import ops
from stillhouse.methods.language.loyalty import (
    label_loyalty,
    probability_loyalty,
    regression_loyalty,
)
from stillhouse.methods.language.masked_text import rare_word_masking, retokenize_embeddings
from stillhouse.train import LogitRows, reduce, row_divergence
from stillhouse.train.forward import FrozenTeacher

__all__ = [
    "EnsembleLoss",
    "TeacherEnsemble",
    "common_tokens",
    "ensemble_kl",
    "label_loyalty",
    "multi_teacher_loss",
    "probability_loyalty",
    "rare_word_masking",
    "regression_loyalty",
    "retokenize_embeddings",
]

Weights = Sequence[float] | Tensor | str | None
Teachers = Sequence[Tensor | ops.SparseTeacher]


def ensemble_kl(
    student_logits: Tensor,
    teacher_logits: Teachers,
    *,
    weights: Weights = None,
    temperature: float = 2.0,
    combine: str = "probs",
    mask: Tensor | None = None,
) -> Tensor:
    """tau^2 sum_k w_k KL(p_k || q), mean over unmasked rows: the gradient of KL to the mean of the
    teachers, of which no [..., V] is made; the value has their own disagreement besides.

    student_logits [..., V]; teacher_logits: K of this shape, or what `common_tokens` makes of one
    with another vocabulary. mask: bool [...], True = counts: all
    attended positions, or the masked ones only. weights: K numbers, scaled to sum 1; None is 1 / K;
    "entropy" is exp(-H(p_k)) of each row, scaled. combine="logits" is tau^2 KL to the softmax of
    the mean of *logits*, where the more confident teacher has the larger say.
    Raises ValueError for no teacher, one that requires a gradient, negative weights or none above
    0, another number of them, temperature <= 0, an unknown combine, and vocabularies that differ.

    Defaults: temperature 2 (DistilBERT), equal weights of probabilities.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import ensemble_kl
        >>> student = torch.zeros(1, 2, requires_grad=True)
        >>> teachers = [torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, 0.0]])]
        >>> loss = ensemble_kl(student, teachers)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.abs().max().item() < 1e-6
        (0.4438, True)
    """
    _check(student_logits, teacher_logits, combine)
    options = {"temperature": temperature, "mask": mask, "return_stats": True}
    if combine == "logits":
        own = [ops.divergence(t, t, **options)[1] for t in teacher_logits]
        shares = _shares([each.teacher_entropy for each in own], weights)
        pairs = zip(shares, teacher_logits, strict=True)
        mean = sum(w[..., None].to(t.dtype) * t for w, t in pairs)
        per_row, _ = ops.divergence(student_logits, mean, **options)
    else:
        found = [ops.divergence(student_logits, t, **options) for t in teacher_logits]
        per_row = _mixed(found, weights)
    return temperature**2 * reduce(per_row, mask)


def multi_teacher_loss(
    student: tuple[Tensor, Tensor],
    teachers: Sequence[tuple[Tensor, Tensor]],
    labels: Tensor,
    mask: Tensor,
    *,
    ce: float = 5.0,
    mlm: float = 2.0,
    cos: float = 1.0,
    **options: Any,
) -> dict[str, Tensor]:
    """The three losses of a batch of masked text, and their weighted sum as `loss`.

    student, teachers: (logits [B, T, V], last hidden states [B, T, H]) each. labels: int64 [B, T],
    the original token where one is predicted, -100 elsewhere (a masked model predicts in place:
    nothing is shifted). mask: bool [B, T], True = attended. options go to `ensemble_kl`; the cosine
    term, 1 - cos at attended positions, is a mean over teachers.
    Raises ValueError as `ensemble_kl`, and for hidden states of another width (map them before).

    Defaults: weights 5, 2, 1 (DistilBERT's published runs).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import multi_teacher_loss
        >>> logits, hidden = torch.randn(2, 4, 9), torch.randn(2, 4, 6)
        >>> labels = torch.full((2, 4), -100)
        >>> mask = torch.ones(2, 4, dtype=torch.bool)
        >>> parts = multi_teacher_loss((logits, hidden), [(logits, hidden)], labels, mask)
        >>> round(parts["loss"].item(), 4)
        0.0
    """
    logits, hidden = student
    for number, (_, other) in enumerate(teachers):
        if other.shape != hidden.shape:
            raise ValueError(
                f"hidden states of teacher {number} are {tuple(other.shape)}, the student's "
                f"{tuple(hidden.shape)}: map them to one width first"
            )
    cosines = [1 - torch.cosine_similarity(hidden, other.detach(), -1) for _, other in teachers]
    parts = {
        "ce": ensemble_kl(logits, [each for each, _ in teachers], mask=mask, **options),
        "mlm": ops.divergence_loss(logits, None, "cross_entropy", labels=labels),
        "cos": reduce(sum(cosines) / len(cosines), mask),
    }
    return {"loss": ce * parts["ce"] + mlm * parts["mlm"] + cos * parts["cos"], **parts}


def common_tokens(
    teacher_logits: Tensor,
    student_ids: Tensor,
    teacher_ids: Tensor,
    vocab_size: int,
    *,
    temperature: float = 2.0,
) -> ops.SparseTeacher:
    """A teacher of another vocabulary at the tokens that both have, all others being one bucket.

    teacher_logits [..., V']; student_ids, teacher_ids int64 [k]: the same strings in either
    vocabulary; vocab_size: the student's. temperature: that of the loss.
    Raises ValueError for ids of two lengths, and as `ops.SparseTeacher`.

    Defaults: temperature 2, that of `ensemble_kl`; the route is ours.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import common_tokens, ensemble_kl
        >>> known = common_tokens(torch.zeros(1, 4), torch.tensor([0, 5]), torch.tensor([1, 2]), 6)
        >>> known.log_probs.exp()
        tensor([[0.2500, 0.2500]])
        >>> loss = ensemble_kl(torch.zeros(1, 6), [known])
    """
    if student_ids.shape != teacher_ids.shape or student_ids.dim() != 1:
        raise ValueError(
            f"expected ids [k] of the same strings, got {tuple(student_ids.shape)} of the student "
            f"and {tuple(teacher_ids.shape)} of the teacher"
        )
    log_p = torch.log_softmax(teacher_logits.float() / temperature, -1)[..., teacher_ids]
    ids = student_ids.int().expand(log_p.shape)
    return ops.SparseTeacher(ids, log_p, vocab_size, temperature, "bucket")


class TeacherEnsemble:
    """Several causal language models in a trainer's teacher's place: a list of their rows.

    They see the student's batch, are put into evaluation mode and never trained; they are to be on
    the training device. Raises ValueError for no model, and one without an output head.

    Defaults: none.

    Example:
        >>> from stillhouse.methods.language import TeacherEnsemble
        >>> TeacherEnsemble([])
        Traceback (most recent call last):
        ...
        ValueError: no teacher: an ensemble has at least one
    """

    def __init__(self, models: Sequence[nn.Module]):
        if not models:
            raise ValueError("no teacher: an ensemble has at least one")
        self.teachers = [FrozenTeacher(model) for model in models]

    def __call__(self, batch: Mapping[str, Any], index: Any) -> list[LogitRows]:
        return [teacher(batch, index) for teacher in self.teachers]


class EnsembleLoss:
    """`ensemble_kl` over the rows of a `TeacherEnsemble`, as an objective for `DistillTrainer`.

    label_weight: share of the cross-entropy to the labels. Beside `loss` the call returns `kl_k`,
    the mean KL to each teacher. The command line names one teacher, so this is for Python.
    Raises ValueError for a label_weight outside [0, 1] and as `ensemble_kl`.

    Defaults: temperature 2 and equal weights as `ensemble_kl`; label_weight 0.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import EnsembleLoss
        >>> from stillhouse.train import LogitRows, supervised_rows
        >>> index = supervised_rows(torch.tensor([[5, 3, 1, 2]]))
        >>> student = torch.zeros(3, 8, requires_grad=True)
        >>> teachers = [LogitRows(torch.eye(3, 8), index), LogitRows(torch.ones(3, 8), index)]
        >>> EnsembleLoss()(LogitRows(student * 1, index), teachers, {})["loss"].backward()
    """

    def __init__(
        self, weights: Weights = None, temperature: float = 2.0, *, label_weight: float = 0.0
    ):
        if not 0 <= label_weight <= 1:
            raise ValueError(f"label_weight is a share in [0, 1], got {label_weight}")
        self.weights, self.temperature, self.label_weight = weights, temperature, label_weight

    def __call__(
        self, student: LogitRows, teacher: Sequence[LogitRows], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        if not isinstance(teacher, Sequence) or not teacher:
            raise ValueError("an ensemble is a list of teachers' rows: pass a TeacherEnsemble")
        options = {"temperature": self.temperature, "return_stats": True}
        columns = {"vocab_size": batch.get("vocab_size")}
        found = [row_divergence(student, each, **options, **columns) for each in teacher]
        per_row = (1 - self.label_weight) * self.temperature**2 * _mixed(found, self.weights)
        if self.label_weight > 0:
            labels = {"labels": student.index.target, **columns}
            hard = row_divergence(student, None, "cross_entropy", **labels)
            per_row = per_row + self.label_weight * hard
        means = {f"kl_{k}": reduce(each.detach()) for k, (each, _) in enumerate(found)}
        return {"loss": reduce(per_row, count=batch.get("denominator")), **means}


def _mixed(found: list[tuple[Tensor, ops.Stats]], weights: Weights) -> Tensor:
    shares = _shares([stats.teacher_entropy for _, stats in found], weights)
    return sum(w.to(each) * each for w, (each, _) in zip(shares, found, strict=True))


def _shares(entropies: list[Tensor], weights: Weights) -> Tensor:
    """Weights that add up to 1, [K, 1] or of each row [K, ...]."""
    if isinstance(weights, str):
        if weights != "entropy":
            raise ValueError(f"weights must be numbers, None or 'entropy', got {weights!r}")
        return torch.softmax(-torch.stack(entropies), 0)
    count = len(entropies)
    given = torch.ones(count) if weights is None else torch.as_tensor(weights)
    given = given.to(entropies[0].device, torch.float64)
    if given.shape != (count,) or not (given >= 0).all() or not 0 < given.sum() < float("inf"):
        raise ValueError(
            f"expected {count} weights from 0 on, one of them above it, got {given.tolist()}"
        )
    return (given / given.sum())[(...,) + (None,) * entropies[0].dim()]


def _check(student_logits: Tensor, teachers: Teachers, combine: str) -> None:
    if not teachers:
        raise ValueError("no teacher: an ensemble has at least one")
    if combine not in ("probs", "logits"):
        raise ValueError(f"combine must be 'probs' or 'logits', got {combine!r}")
    for number, teacher in enumerate(teachers):
        if isinstance(teacher, ops.SparseTeacher):
            if combine == "logits":
                raise ValueError(f"teacher {number} has no logits to average: combine='probs'")
            continue
        if teacher.requires_grad:
            raise ValueError(f"no gradient flows to teacher {number}: detach its logits")
        if teacher.shape[-1] != student_logits.shape[-1]:
            raise ValueError(
                f"teacher {number} has {teacher.shape[-1]} columns and the student "
                f"{student_logits.shape[-1]}: give it the student's tokenizer "
                "(retokenize_embeddings), compare what both have (common_tokens), or hidden states "
                "alone"
            )
