"""What of a batch of token rows the Sinkhorn term of `SinKDLoss` looks at."""

from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.train import LogitRows


class Groups(NamedTuple):
    """Log-probabilities [G, group, k + 1] of both sides, the last column that of all other tokens,
    and the mean of the teacher's mass there."""

    student: Tensor
    teacher: Tensor
    dropped: Tensor


def rows_in_groups(
    student: LogitRows,
    teacher: LogitRows,
    columns: int | None,
    *,
    rows: int,
    group: int,
    top: int,
    temperature: float,
) -> Groups:
    """At most `rows` evenly spaced rows, `group` at a time, what is left over being dropped; of the
    first `columns` columns those that are among the teacher's `top` in one of the rows."""
    every = -(-len(student) // rows) or 1
    sampled = slice(None, None, every)
    # Copies: the two terms of the loss must not share what one of them writes over.
    own = student.part(sampled).logits[:, :columns].clone()
    with torch.no_grad():
        other = teacher.part(sampled).logits[:, :columns]
        p = torch.softmax(other.float() / temperature, -1)
        ids = p.topk(min(top, p.shape[-1]), -1).indices.unique()
        dropped = (1 - p[:, ids].sum(-1)).mean() if len(p) else p.sum()
    count = len(own) // group
    pair = (
        _projected(x[: count * group], ids, temperature).view(count, group, len(ids) + 1)
        for x in (own, other)
    )
    return Groups(*pair, dropped)


def _projected(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [N, k + 1] at these columns, and of all others together: rows stay
    distributions."""
    log_p = torch.log_softmax(logits.float() / temperature, -1)
    known = log_p[:, ids]
    rest = (1 - known.exp().sum(-1, keepdim=True)).clamp(min=1e-30).log()
    return torch.cat([known, rest], -1)
