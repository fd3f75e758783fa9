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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.methods.language.ensemble_divergence import ensemble_kl
from stillhouse.methods.language.ensemble_objective import EnsembleLoss, TeacherEnsemble
from stillhouse.methods.language.loyalty import (
    label_loyalty,
    probability_loyalty,
    regression_loyalty,
)
from stillhouse.methods.language.masked_text import rare_word_masking, retokenize_embeddings
from stillhouse.methods.language.shared_vocabulary import common_tokens
from stillhouse.train import reduce

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
        >>> logits, hidden = torch.zeros(2, 4, 9), torch.ones(2, 4, 6)
        >>> labels = torch.full((2, 4), -100)
        >>> mask = torch.ones(2, 4, dtype=torch.bool)
        >>> parts = multi_teacher_loss((logits, hidden), [(logits, hidden)], labels, mask)
        >>> abs(parts["loss"].item()) < 1e-5  # the teacher says what the student says
        True
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
