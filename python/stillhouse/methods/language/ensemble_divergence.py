"""The divergence of one student from several teachers."""

from collections.abc import Sequence

from torch import Tensor

from stillhouse import ops
from stillhouse.methods.language.ensemble_weights import Weights, mixed, shares_of
from stillhouse.train import reduce

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
        shares = shares_of([each.teacher_entropy for each in own], weights)
        pairs = zip(shares, teacher_logits, strict=True)
        mean = sum(w[..., None].to(t.dtype) * t for w, t in pairs)
        per_row, _ = ops.divergence(student_logits, mean, **options)
    else:
        found = [ops.divergence(student_logits, t, **options) for t in teacher_logits]
        per_row = mixed(found, weights)
    return temperature**2 * reduce(per_row, mask)


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
