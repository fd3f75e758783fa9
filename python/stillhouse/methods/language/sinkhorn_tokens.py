"""Entropic transport within each row, between the tokens of two vocabularies."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.methods.language.sinkhorn_batch import check, probabilities


def sample_sinkhorn_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
    gradient: str = "unrolled",
) -> Tensor:
    """The sample-wise form that came before: within each row, the probabilities themselves are the
    points, and moving class k's to class l's costs |s_k - u_l|. Mean over rows.

    student_logits [..., C], teacher_logits [..., C'] of the same rows. The vocabularies may differ:
    the shorter one is continued by probabilities of 0, and with epsilon -> 0 this is the divergence
    `ops.ULD` of sorted rows. No [C, C'] costs are stored. Returns a scalar as `sinkhorn_kd` does.
    Raises ValueError for other rows and a teacher that requires a gradient.

    Defaults: as `sinkhorn_kd`; the authors' code has no such form (our reading of the paper).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import sample_sinkhorn_kd
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, 0.0, 0.0, 0.0]])
        >>> round(sample_sinkhorn_kd(student, teacher, epsilon=0.001).item(), 3)
        1.0
    """
    check(student_logits, teacher_logits, same_classes=False)
    student = probabilities(student_logits, temperature).flatten(0, -2)
    teacher = probabilities(teacher_logits, temperature).flatten(0, -2)
    classes = max(student.shape[-1], teacher.shape[-1])
    points = [
        torch.nn.functional.pad(x, (0, classes - x.shape[-1]))[..., None]
        for x in (student, teacher)
    ]
    options = dict(cost="l1", iterations=iterations, gradient=gradient)
    return ops.sinkhorn_points(*points, epsilon, **options).value.mean()


def embedded_sinkhorn_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    *,
    top: int = 32,
    temperature: float = 1.0,
    epsilon: float = 0.1,
    iterations: int = 50,
) -> tuple[Tensor, Tensor]:
    """Transport between what two vocabularies say, row by row, along the distances of tokens.

    student_logits [..., V], teacher_logits [..., V'], embeddings [V, d] and [V', d] of the two
    vocabularies in one space (of the detokenised strings, say; no gradient flows to them). Of each
    row the `top` most probable tokens of either side are kept and scaled to mass 1: marginals of a
    transport problem whose costs are 1 - cosine of the embeddings. The gradient goes to the
    student's probabilities as marginals, by the fixed point.
    Returns the mean value and the mean mass that the student's side leaves out, both scalars.
    Raises ValueError for shapes that do not match.

    Defaults: ours; the paper keeps to one vocabulary.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import embedded_sinkhorn_kd
        >>> tokens = torch.eye(4)
        >>> student = torch.zeros(1, 4, requires_grad=True)
        >>> teacher = torch.tensor([[5.0, 0.0, 0.0]])
        >>> loss, left_out = embedded_sinkhorn_kd(student, teacher, tokens, tokens[:3])
        >>> loss.backward()
        >>> bool(student.grad[0, 0] < 0 < student.grad[0, 3])
        True
    """
    check(student_logits, teacher_logits, same_classes=False)
    sides = []
    for logits, embeddings in (
        (student_logits, student_embeddings),
        (teacher_logits, teacher_embeddings),
    ):
        if embeddings.dim() != 2 or embeddings.shape[0] != logits.shape[-1]:
            raise ValueError(
                f"embeddings must be [{logits.shape[-1]}, d], a row a column of the logits, got "
                f"{tuple(embeddings.shape)}"
            )
        p = probabilities(logits.flatten(0, -2), temperature)
        mass, ids = p.topk(min(top, p.shape[-1]), -1)
        total = mass.sum(-1, keepdim=True)
        unit = torch.nn.functional.normalize(embeddings.detach().to(mass.dtype), dim=-1)
        sides.append((mass / total, unit[ids], 1 - total))
    (a, x, left_out), (b, y, _) = sides
    distance = (1 - x @ y.mT).clamp(min=0)
    options = dict(a=a, b=b, iterations=iterations, gradient="implicit", return_plan=False)
    return ops.sinkhorn(distance, epsilon, **options).value.mean(), left_out.mean().detach()
