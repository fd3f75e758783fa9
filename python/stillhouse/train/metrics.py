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
    target = student.index.target
    if reference is None:
        nll = ops.divergence(
            student.logits, None, "cross_entropy", labels=target, vocab_size=vocab_size
        )
        missing = torch.full_like(nll, math.nan)
        columns = [torch.ones_like(nll), nll, *[missing] * (len(COLUMNS) - 2)]
    else:
        pair = student.logits, reference.logits
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
    rows = torch.stack(columns, dim=1).float()
    return rows.new_zeros(sequences, len(COLUMNS)).index_add(0, student.index.sequence, rows)


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
