"""What a teacher of another vocabulary says about the tokens that it shares with the student."""

import torch
from torch import Tensor

from stillhouse import ops


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
