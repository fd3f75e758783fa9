"""The losses that a distillation paper compares itself with, each as its authors set it.

A row of logits is one token; q = softmax(z / T) is the student, p the teacher. Every loss takes
logits [..., V] of any float dtypes, the student's first, and `mask`, bool [...], True = this row
counts; it is a mean over those rows, a float32 scalar (float64 for float64 logits), 0 where none
counts, and its gradient goes to the student alone. Each is a kind of `stillhouse.ops` with its
paper's numbers; the same kinds are `--method`s of `stillhouse distill`:

    GKD                       --method jsd --method_options beta=0.5 --on_policy 0.5
    DistiLLM                  --method skew_reverse_kl --on_policy_adapts true --eval_strategy steps
    MiniLLM, token by token   --method reverse_kl --on_policy 1

All raise ValueError for shapes that do not match and for numbers out of their kind's range.

Example:
    >>> import torch
    >>> from stillhouse.methods.language import standard
    >>> student, teacher = torch.zeros(3, 4), 2 * torch.eye(3, 4)
    >>> round(standard.gkd_loss(student, teacher).item(), 4)
    0.1107
    >>> round(standard.distillm_loss(student, teacher).item(), 4)
    0.3601
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stillhouse import ops
from stillhouse.train import AdaptiveShare, Replay, ResponseSource


def gkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, **options: Any
) -> Tensor:
    """Generalised JSD, beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; as the
    authors have it, beta 0 is forward KL and beta 1 reverse KL, which are not its limits.

    GKD, arXiv 2306.13649, for responses of `gkd_source`. Defaults: beta 0.5, one of their
    0.1, 0.5 and 0.9; temperature 1. options: `mask`, `temperature`, and what else
    `ops.divergence_loss` has.
    """
    kind = {0: ops.ForwardKL(), 1: ops.ReverseKL()}.get(beta) or ops.JSD(beta)
    return ops.divergence_loss(student_logits, teacher_logits, kind, **options)


def gkd_source(
    prompts: Sequence[Any], dataset: Sequence[Any], student: Any, *, share: float = 0.5, **options
) -> ResponseSource:
    """GKD's mixture: with the probability `share` (lambda) a batch is the student's own responses,
    else the data's. Defaults: share 0.5 (paper; 1 is its on-policy form). options: of
    `ResponseSource`, which needs `max_new_tokens`."""
    return ResponseSource(prompts, dataset=dataset, student=student, share=share, **options)


def distillm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alpha: float = 0.1,
    *,
    reverse: bool = True,
    **options: Any,
) -> Tensor:
    """Skew reverse KL, KL(q || (1 - alpha) p + alpha q), or with `reverse=False` skew KL,
    KL(p || alpha p + (1 - alpha) q).

    DistiLLM, arXiv 2402.03898. Defaults: alpha 0.1 (paper), the reverse form (their
    best). options as in `gkd_loss`.
    """
    kind = (ops.SkewReverseKL if reverse else ops.SkewKL)(alpha)
    return ops.divergence_loss(student_logits, teacher_logits, kind, **options)


def distillm_source(
    prompts: Sequence[Any],
    dataset: Sequence[Any],
    student: Any,
    *,
    capacity: int = 1000,
    **options: Any,
) -> tuple[ResponseSource, AdaptiveShare]:
    """DistiLLM's adaptive off-policy source, and the schedule to tell of steps and evaluations:
    `update({}, step, total_steps)`, `evaluated(validation_loss)`.

    arXiv 2402.03898, Algorithm 1. Defaults: capacity 1000 (authors' code), and `AdaptiveShare`'s.
    options: of `ResponseSource`.
    """
    source = ResponseSource(
        prompts, dataset=dataset, student=student, replay=Replay(capacity), share=0.0, **options
    )
    return source, AdaptiveShare(source)


def minillm_token_loss(student_logits: Tensor, teacher_logits: Tensor, **options: Any) -> Tensor:
    """Reverse KL of each token of the student's own responses: MiniLLM's objective without the
    influence that a token has on later ones, which its authors take by policy gradients.

    MiniLLM, arXiv 2306.08543, the single-step part of its gradient. options as in `gkd_loss`.
    """
    return ops.divergence_loss(student_logits, teacher_logits, "reverse_kl", **options)


def abkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alpha: float = 0.2,
    beta: float = 0.7,
    **options: Any,
) -> Tensor:
    """The alpha-beta divergence: alpha weighs where the teacher is sure, beta where the student is.

    ABKD, arXiv 2505.04560. Defaults: alpha 0.2, beta 0.7 (paper, language models). options
    as in `gkd_loss`.
    """
    kind = ops.AlphaBeta(alpha, beta)
    return ops.divergence_loss(student_logits, teacher_logits, kind, **options)


def akl_loss(
    student_logits: Tensor, teacher_logits: Tensor, mu: float = 0.5, **options: Any
) -> Tensor:
    """Forward and reverse KL weighted, row by row, by the error in the teacher's head and tail.

    Adaptive KL, arXiv 2404.02657, eq. 8. Default: mu 0.5 (paper), the mass of the head. options as
    in `gkd_loss`.
    """
    return ops.divergence_loss(student_logits, teacher_logits, ops.AdaptiveKL(mu), **options)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    *,
    temperature: float = 4.0,
    **options: Any,
) -> Tensor:
    """T^2 times alpha target-class KL + beta non-target KL; labels int64 [...], -100 = not counted.

    Decoupled KD, arXiv 2203.08679, eq. 7. Defaults: alpha 1, beta 8, temperature 4 (the authors'
    CIFAR-100 settings; ImageNet 1, 0.5, 1). options as in `gkd_loss`.
    """
    options |= dict(labels=labels, temperature=temperature)
    kind = ops.DKD(alpha, beta)
    return temperature**2 * ops.divergence_loss(student_logits, teacher_logits, kind, **options)


def uld_loss(student_logits: Tensor, teacher_logits: Tensor, **options: Any) -> Tensor:
    """sum_k |q_(k) - p_(k)|, both sorted: for teachers with another vocabulary, [..., V] and
    [..., W]. The rows must stand for the same places of the text.

    Universal logit distillation, arXiv 2402.12030, eq. 6; the authors add 1.5 times it to the
    cross-entropy. options as in `gkd_loss`.
    """
    return ops.divergence_loss(student_logits, teacher_logits, "uld", **options)


def standardized_kl_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0, **options: Any
) -> Tensor:
    """T^2 times the forward KL of logits that are standardised, (z - mean) / std / T, row by row.

    Logit standardisation, arXiv 2403.01427. Default: temperature 2 (authors' code,
    which weighs the loss by 9 beside the cross-entropy). options as in `gkd_loss`.
    """
    options |= dict(temperature=temperature)
    loss = ops.divergence_loss(student_logits, teacher_logits, "standardized_kl", **options)
    return temperature**2 * loss
