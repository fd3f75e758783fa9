"""FIRST: five stored tokens a position, made trustworthy before they are taught.

A fine-tuned language model is right more often than its base model, and far surer than it is right.
FIRST keeps the teacher's five largest probabilities at each position, which hold about 95 % of the
mass, softens them with one number c that makes the calibration error on held-out text smallest, and
teaches the student nothing else.

Equation, P(1..k) the teacher's largest probabilities, q = softmax(z) the student's of all tokens:

    P'(i) = exp(P(i) / c) / sum_j exp(P(j) / c),   L = sum_i P'(i) (log P'(i) - log q(i))
    dL/dz = q - P'   (P' = 0 at all other tokens)

Paper: FIRST: Teach A Reliable Large Language Model Through Efficient Trustworthy Distillation,
EMNLP 2024, arXiv 2408.12168. Code by its authors: SHUMKASHUN/FIRST.

Where their code differs: it also re-calibrates the student, with which the teacher's overconfidence
is copied (softmax(P / c) = softmax(Q / c) means Q = P + constant), or compares among the k tokens
alone, which leaves all other mass free (`ops.SupportKL`); its example run puts probabilities where
logarithms are expected, and learns the argmax. We do none of it. It adds up a sequence's positions
and we take their mean, as all objectives here: its learning rates do not carry over.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.ops.sparse_teacher import log_of_rest
from stillhouse.train import DivergenceObjective, LogitRows, ece, paired

TAILS = ("renormalize", "bucket")
Metric = str | Callable[[Tensor, Tensor], float]


def recalibrate(teacher: ops.SparseTeacher, c: float, *, space: str = "prob") -> ops.SparseTeacher:
    """The teacher with its known probabilities P made softmax(P / c), a softmax of *probabilities*.

    Small c sharpens, large c makes them even. space="logit" is the classical temperature instead:
    P^(1 / c), scaled to sum 1. With the tail "renormalize" the known columns become the whole row;
    with "bucket" what is left of the mass is one more P among them. Ids of -1 stay without mass.
    Returns a teacher of temperature 1: a softmax of probabilities has no temperature to undo.
    Raises ValueError for c <= 0, another space, another tail, log-probabilities that are NaN (of
    negative probabilities, on the CPU), and for space="prob" a teacher of another temperature.

    Defaults: space "prob" (paper and code).

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> from stillhouse.methods.language import recalibrate
        >>> top = torch.tensor([[0.9, 0.05, 0.02, 0.02, 0.01]]).log()
        >>> teacher = ops.SparseTeacher(torch.arange(5)[None], top, 100, tail="renormalize")
        >>> recalibrate(teacher, 0.3).log_probs.exp()
        tensor([[0.8219, 0.0483, 0.0437, 0.0437, 0.0423]])
    """
    if not 0 < c < float("inf"):
        raise ValueError(f"c must be a positive number, got {c}")
    if space not in ("prob", "logit"):
        raise ValueError(f"space must be 'prob' or 'logit', got {space!r}")
    if teacher.tail not in TAILS:
        raise ValueError(f"the teacher's tail must be {' or '.join(TAILS)}, got {teacher.tail!r}")
    if space == "prob" and teacher.temperature != 1:
        raise ValueError(
            f"these are probabilities at temperature {teacher.temperature:g}: c is for those at "
            "temperature 1"
        )
    known = teacher.log_probs.masked_fill(teacher.ids < 0, -torch.inf)
    if known.is_cpu and known.isnan().any():
        raise ValueError("a log-probability is NaN: is a probability negative?")
    has_rest = teacher.tail == "bucket"
    if has_rest:
        known = torch.cat([known, log_of_rest(known, teacher.log_rest).to(known)], -1)
    x = known.exp().masked_fill(known == -torch.inf, -torch.inf) if space == "prob" else known
    log_probs = torch.log_softmax(x / c, -1)
    return ops.SparseTeacher(
        teacher.ids,
        log_probs[..., :-1] if has_rest else log_probs,
        teacher.vocab_size,
        1.0,
        teacher.tail,
        log_probs[..., -1] if has_rest else None,
        _trusted=True,
    )


def fit_temperature(
    teacher: ops.SparseTeacher,
    labels: Tensor,
    *,
    metric: Metric = "ece",
    coarse: float = 0.1,
    fine: float = 0.02,
    space: str = "prob",
) -> tuple[float, dict[float, float]]:
    """The c with the smallest calibration error of the teacher's first token on labelled text.

    teacher: N held-out positions; labels: int64, the token that follows each, -100 = not counted.
    A position counts as right where its most probable known token is the label, and its confidence
    is what `recalibrate` gives that token. metric: "ece", or a function of (confidence [n], correct
    bool [n]) to be made small. Searched are coarse, 2 coarse, ... 1, then steps of `fine` within
    one `coarse` of the best; of equal ones the smallest. Returns c and the metric at every c tried,
    ascending: it need not have one valley, and wants a thousand positions or more.
    Raises ValueError for labels of another shape or outside the vocabulary, none that counts, steps
    outside (0, 1] and as `recalibrate`.

    Defaults: metric, steps and space of the paper.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> from stillhouse.methods.language import fit_temperature
        >>> logits = torch.tensor([6.0, 1.0, 0.0]).expand(10, 3)
        >>> teacher = ops.SparseTeacher.from_logits(logits, k=2, tail="renormalize")
        >>> c, curve = fit_temperature(teacher, torch.tensor([0] * 8 + [1] * 2))
        >>> c, round(curve[c], 3)
        (0.72, 0.003)
    """
    if labels.shape != teacher.ids.shape[:-1]:
        raise ValueError(
            f"expected a label a row, {tuple(teacher.ids.shape[:-1])}, got {tuple(labels.shape)}"
        )
    counts = labels != -100
    if not counts.any():
        raise ValueError("no label counts: c is fitted on labelled text that was held out")
    outside = counts & ((labels < 0) | (labels >= teacher.vocab_size))
    if outside.any():
        wrong, size = int(labels[outside][0]), teacher.vocab_size
        raise ValueError(f"label {wrong} is outside the vocabulary of {size}")
    if not (0 < coarse <= 1 and 0 < fine <= 1):
        raise ValueError(f"coarse and fine must lie in (0, 1], got {coarse} and {fine}")
    measure = ece if metric == "ece" else metric
    if not callable(measure):
        raise ValueError(f"metric must be 'ece' or a function, got {metric!r}")
    first = teacher.log_probs.masked_fill(teacher.ids < 0, -torch.inf).argmax(-1, keepdim=True)
    correct = (teacher.ids.gather(-1, first)[..., 0] == labels)[counts]
    curve: dict[float, float] = {}

    def try_all(values: list[float]) -> float:
        for c in values:
            top = recalibrate(teacher, c, space=space).log_probs.gather(-1, first)[..., 0]
            curve[c] = float(measure(top[counts].double().exp(), correct))
        return min(sorted(curve), key=curve.get)

    best = try_all([round(i * coarse, 10) for i in range(1, int(1 / coarse + 1e-9) + 1)])
    around = [round(best + i * fine, 10) for i in range(-int(coarse / fine + 1e-9), 0)]
    around += [round(best + i * fine, 10) for i in range(1, int(coarse / fine + 1e-9) + 1)]
    best = try_all([c for c in around if c > 0 and c not in curve])
    return best, dict(sorted(curve.items()))


class FIRSTLoss(DivergenceObjective):
    """Forward KL from the re-calibrated top k, as an objective for `DistillTrainer`.

    The teacher is a stored one (`ops.SparseTeacher` with this `tail`; `stillhouse capture --k 5`),
    of which the k largest are taken, or a model, of whose logits they are. c as in `recalibrate`,
    from `fit_temperature`; c=None leaves the probabilities as they are (plain top-k distillation).
    tail: "renormalize", all mass is theirs; "bucket", all other tokens are one more.
    The call returns `loss`, the mean over the batch's supervised tokens, with the statistics of the
    student against this target. There is no temperature and no label term.
    Raises ValueError for c <= 0, k < 1 or above the vocabulary, another tail, and in the call for a
    stored teacher with less than k columns or another tail.

    Defaults: k 5 and tail "renormalize" (paper; the code has a switch for other tokens); c is the
    teacher's and the text's own, in the paper often 0.3.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> from stillhouse.methods.language import FIRSTLoss
        >>> from stillhouse.train import LogitRows, supervised_rows
        >>> index = supervised_rows(torch.tensor([[5, 3, 1, 2]]))
        >>> student = torch.zeros(3, 8, requires_grad=True)
        >>> teacher = ops.SparseTeacher.from_logits(torch.eye(3, 8), k=5, tail="renormalize")
        >>> FIRSTLoss(c=0.3)(LogitRows(student * 1, index), teacher, {})["loss"].backward()
    """

    def __init__(
        self, c: float | None, *, k: int = 5, space: str = "prob", tail: str = "renormalize"
    ):
        if c is not None and not 0 < c < float("inf"):
            raise ValueError(f"c must be a positive number or None, got {c}")
        if space not in ("prob", "logit"):
            raise ValueError(f"space must be 'prob' or 'logit', got {space!r}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if tail not in TAILS:
            raise ValueError(f"tail must be {' or '.join(TAILS)}, got {tail!r}")
        super().__init__("forward_kl")
        self.c, self.k, self.space, self.tail = c, k, space, tail
        self.sparse_tails, self.takes_draws = (tail,), False  # what is drawn is not the largest

    def __call__(
        self, student: LogitRows, teacher: Any, batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        if isinstance(teacher, LogitRows):
            paired(student.index, teacher.index)
            logits = teacher.logits[:, : batch.get("vocab_size")]
            teacher = ops.SparseTeacher.from_logits(logits, k=self.k, tail=self.tail)
        else:
            teacher = self._largest(teacher)
        if self.c is not None:
            teacher = recalibrate(teacher, self.c, space=self.space)
        return super().__call__(student, teacher, batch)

    def _largest(self, teacher: ops.SparseTeacher) -> ops.SparseTeacher:
        known = teacher.ids.shape[-1]
        if teacher.tail != self.tail or known < self.k:
            raise ValueError(
                f"expected a stored teacher of at least {self.k} columns with the tail "
                f"{self.tail!r}, got {known} with {teacher.tail!r}"
            )
        if known == self.k:
            return teacher
        log_probs, place = teacher.log_probs.topk(self.k, -1)
        return ops.SparseTeacher(
            teacher.ids.gather(-1, place),
            log_probs,
            teacher.vocab_size,
            teacher.temperature,
            teacher.tail,
            _trusted=True,
        )
