"""The largest probabilities of a teacher, softened until they are as right as they are sure."""

from collections.abc import Callable

import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.ops.sparse_teacher import log_of_rest
from stillhouse.train import ece

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
