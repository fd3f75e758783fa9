"""How far two models' products of adjacent distributions are apart, within phrases."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stillhouse.methods.language.phrases import Spans

PAIRS = 64  # pairs of rows whose products exist at a time


def span_correlation(student_logits: Tensor, teacher_logits: Tensor, spans: Spans) -> Tensor:
    """Mean of || q_i q_{i+1} - p_i p_{i+1} ||^2 over the adjacent rows of each span.

    student_logits, teacher_logits: [T, V]; spans: (start, end) of rows, end excluded, in order and
    apart. Spans of one row have no pair; without a pair the loss is 0. No [T, V] products are
    stored: they are made again in the backward pass. Returns a float32 scalar (float64 for float64
    logits). Raises ValueError for spans that overlap, are not sorted or out of range, shapes that
    do not match, and a teacher that requires a gradient.

    Defaults: the squared Euclidean norm (our reading).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import span_correlation
        >>> student, teacher = torch.zeros(4, 2), 9 * torch.eye(2)[[0, 0, 1, 1]]
        >>> round(span_correlation(student, teacher, [(0, 2), (2, 4)]).item(), 3)  # 9/16 + 1/16
        0.625
    """
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ValueError(
            "student and teacher must be [T, V] of one shape, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if teacher_logits.requires_grad:
        raise ValueError("no gradient flows to the teacher: detach its logits")
    last = 0
    for start, end in spans:
        if not last <= start < end <= len(student_logits):
            raise ValueError(
                f"span ({start}, {end}) after {last}: spans must be sorted, apart, not empty and "
                f"within {len(student_logits)} rows"
            )
        last = end
    pairs = [row for start, end in spans for row in range(start, end - 1)]
    first = torch.tensor(pairs, dtype=torch.int64, device=student_logits.device)
    # Of no rows: a 0 with a gradient, whatever the logits are.
    total = student_logits[:0].sum()
    for part in first.split(PAIRS):
        options = dict(use_reentrant=False, preserve_rng_state=False)
        total = total + checkpoint(_squares, student_logits, teacher_logits, part, **options)
    return total / max(len(pairs), 1)


def _squares(student_logits: Tensor, teacher_logits: Tensor, first: Tensor) -> Tensor:
    """The sum over pairs of rows (first, first + 1)."""

    def product(logits: Tensor) -> Tensor:
        # In float32 at least: products of probabilities are tiny.
        wide = torch.promote_types(logits.dtype, torch.float32)
        return logits[first].softmax(-1, wide) * logits[first + 1].softmax(-1, wide)

    return (product(student_logits) - product(teacher_logits)).square().sum()
