"""How well a model predicts and how close it is to a reference, as sums that add up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.train.forward import evaluating, row_forward
from stillhouse.train.objective import LogitRows
from stillhouse.train.rows import supervised_rows

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


@torch.no_grad()
def fidelity(
    model: Any,
    reference: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    vocab_size: int | None = None,
) -> dict[str, float]:
    """How close a model is to a reference on the targets of `batches`, language-model batches with
    `labels` on the models' device.

    model, reference: causal language models of one vocabulary, or callables as for `row_forward`;
    they are put in evaluation mode, and back again. vocab_size: the columns that count.
    Returns means over all targets, in nats: `forward_kl` = KL(reference || model), `reverse_kl`,
    `acceptance` (sum of min(p, q)), `agreement` (of the likeliest tokens), `loss` and `perplexity`
    of the model, `reference_perplexity`, and `tokens`, their number. Raises ValueError where the
    batches have no target.

    Example:
        >>> import torch
        >>> from stillhouse.train import fidelity
        >>> def uniform(ids):
        ...     return torch.zeros(*ids.shape, 4)
        >>> batch = {"input_ids": torch.tensor([[0, 1, 2]]), "labels": torch.tensor([[0, 1, 2]])}
        >>> found = fidelity(uniform, uniform, [batch])
        >>> round(found["perplexity"], 6), found["forward_kl"], found["tokens"]
        (4.0, 0.0, 2.0)
    """
    student, teacher = row_forward(model), row_forward(reference)
    sums = []
    with evaluating(model, reference):
        for batch in batches:
            index, count = supervised_rows(batch["labels"]), len(batch["labels"])
            rows = student(batch, index), teacher(batch, index)
            sums.append(sequence_sums(*rows, count, vocab_size=vocab_size).cpu())
    return summarize(torch.cat(sums) if sums else torch.zeros(0, len(COLUMNS)))


class PowerLaw(NamedTuple):
    """y = e^a x^-b: `r2` is the share of the variance of log y that it explains, `sigma` the
    standard deviation of the n residuals, with n - 2 degrees of freedom."""

    a: float
    b: float
    r2: float
    sigma: float

    def __call__(self, x: float) -> float:
        """y at x."""
        return math.exp(self.a - self.b * math.log(x))


def power_law_fit(
    x: Sequence[float], y: Sequence[float], *, window: tuple[float, float] | None = None
) -> PowerLaw:
    """Least squares of log y on log x, on the points with `window[0] <= x <= window[1]`.

    x, y: positive numbers. Raises ValueError for fewer than 5 points, unlike lengths, numbers that
    are not positive, and where all x are equal.

    Example:
        >>> from stillhouse.train import power_law_fit
        >>> law = power_law_fit([1, 2, 4, 8, 16], [3, 1.5, 0.75, 0.375, 0.1875])
        >>> round(law.b, 6), round(law(32), 6)
        (1.0, 0.09375)
    """
    points = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if points[0].shape != points[1].shape or points[0].ndim != 1:
        raise ValueError(f"expected as many x as y, got {points[0].shape} and {points[1].shape}")
    if window is not None:
        inside = (points[0] >= window[0]) & (points[0] <= window[1])
        points = points[0][inside], points[1][inside]
    count = len(points[0])
    if count < 5:
        raise ValueError(f"a power law needs at least 5 points, got {count}")
    if not all((each > 0).all() and np.isfinite(each).all() for each in points):
        raise ValueError("a power law is of positive numbers: x or y holds another one")
    log_x, log_y = map(np.log, points)
    centred = log_x - log_x.mean()
    spread = float(centred @ centred)
    if spread == 0:
        raise ValueError("a power law needs different x, these are all equal")
    slope = float(centred @ log_y) / spread
    a = float(log_y.mean() - slope * log_x.mean())
    residual = log_y - a - slope * log_x
    total = float(((log_y - log_y.mean()) ** 2).sum())
    left = float(residual @ residual)
    return PowerLaw(a, -slope, 1 - left / total if total else 1.0, math.sqrt(left / (count - 2)))
