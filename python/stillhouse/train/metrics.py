"""How well a model predicts and how close it is to a reference, as sums that add up."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.train.objective import LogitRows

# Columns of the sums of one sequence; those after the second need a reference.
COLUMNS = (
    "tokens",
    "nll",
    "reference_nll",
    "forward_kl",
    "reverse_kl",
    "acceptance",
    "agreement",
)


# Rows whose logits exist at a time.
ROWS = 256


@torch.no_grad()
def sequence_sums(
    student: LogitRows,
    reference: LogitRows | None,
    sequences: int,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """Sums over the supervised rows of each of B `sequences`: float32 [B, 7], `COLUMNS` (nats).

    `nll` is -log q(target). Without a reference its columns are NaN.
    """
    result = torch.zeros(sequences, len(COLUMNS), device=student.index.row.device)
    for start in range(0, len(student), ROWS):
        rows = slice(start, start + ROWS)
        part = student.part(rows)
        other = None if reference is None else reference.part(rows)
        result.index_add_(0, part.index.sequence, _row_columns(part, other, vocab_size))
    return result


def _row_columns(student: LogitRows, reference: LogitRows | None, vocab_size: int | None) -> Tensor:
    """`COLUMNS` of each row, [N, 7]."""
    target, logits = student.index.target, student.logits
    if reference is None:
        nll = ops.divergence(logits, None, "cross_entropy", labels=target, vocab_size=vocab_size)
        missing = torch.full_like(nll, math.nan)
        columns = [torch.ones_like(nll), nll, *[missing] * (len(COLUMNS) - 2)]
    else:
        pair = logits, reference.logits
        forward_kl, stats = ops.divergence(
            *pair, "forward_kl", vocab_size=vocab_size, return_stats=True
        )
        reverse_kl = ops.divergence(*pair, "reverse_kl", vocab_size=vocab_size)
        chosen = [logits.gather(1, target[:, None])[:, 0].float() for logits in pair]
        columns = [
            torch.ones_like(forward_kl),
            stats.student_lse - chosen[0],
            stats.teacher_lse - chosen[1],
            forward_kl,
            reverse_kl,
            stats.acceptance,
            stats.agreement,
        ]
    return torch.stack(columns, dim=1).float()


def summarize(sums: Any) -> dict[str, float]:
    """Means over all tokens from rows of `COLUMNS` ([n, 7], tensor or array): `loss` (mean -log q),
    `perplexity`, `tokens`, and with a reference `reference_perplexity`, divergences and rates."""
    total = torch.as_tensor(sums).double().reshape(-1, len(COLUMNS)).sum(0)
    tokens = total[0].item()
    if tokens == 0:
        raise ValueError("no supervised token in the evaluation data: nothing to average over")
    means = dict(zip(COLUMNS, (total / tokens).tolist(), strict=True))
    result = {"loss": means["nll"], "perplexity": _exp(means["nll"]), "tokens": tokens}
    if not math.isnan(means["reference_nll"]):
        result["reference_perplexity"] = _exp(means["reference_nll"])
        result |= {name: means[name] for name in COLUMNS[3:]}
    return result


def _exp(nats: float) -> float:
    # A float ends at e^709; what a broken model does there is "infinite" to a reader.
    return math.inf if nats >= 700 else math.exp(nats)
