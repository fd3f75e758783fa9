"""Cross-entropy to a target between the student's own distribution and the teacher's."""

from torch import Tensor

from stillhouse import ops
from stillhouse.train import reduce


def taid_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    t: float | Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """Cross-entropy to the interpolated target, -sum p_t log q, mean over the unmasked rows.

    student_logits, teacher_logits: [..., V], any float dtype each; the gradient goes to the
    student's q alone, never into the target or the teacher. t in [0, 1]: 0 gives a zero gradient,
    1 forward KL's; a 0-d tensor where it changes under torch.compile. mask: bool [...], True = this
    row counts; nothing unmasked gives 0. temperature divides both sides, no T^2 factor.
    Returns a float32 scalar (float64 for float64 logits). Raises ValueError for t outside [0, 1]
    and for shapes or vocabularies that do not match.

    Defaults: temperature 1 (the authors' code).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import taid_loss
        >>> student = torch.tensor([[0.25, 0.50, 0.25]]).log().requires_grad_()
        >>> teacher = torch.tensor([[0.50, 0.25, 0.25]]).log()
        >>> loss = taid_loss(student, teacher, t=0.4)
        >>> round(loss.item(), 4)
        1.1124
        >>> loss.backward()
    """
    per_row = ops.divergence(
        student_logits, teacher_logits, ops.TAID(t), mask=mask, temperature=temperature
    )
    return reduce(per_row, mask)
