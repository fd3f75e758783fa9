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

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stillhouse import ops
from stillhouse.methods.language.recalibration import TAILS, fit_temperature, recalibrate
from stillhouse.train import DivergenceObjective, LogitRows, paired

__all__ = ["FIRSTLoss", "fit_temperature", "recalibrate"]


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
