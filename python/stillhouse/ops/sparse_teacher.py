"""A teacher that is known at a few columns of each row: the top of its distribution, or draws."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

# In the order of the kernel's numbers (csrc/divergence/kernel.h).
TAILS = ("bucket", "renormalize", "uniform", "drop")
# Float32 probabilities of a large vocabulary add up to 1 only so closely.
_SLACK = 1e-3
# Elements that are widened to float64 at a time.
_ELEMENTS = 1 << 24


@dataclass(frozen=True, eq=False)
class SparseTeacher:
    """Log-probabilities of k columns of each row, and what is taken to be true of the others.

    Args:
        ids: int32 or int64 [..., k], the columns, each at most once in a row; -1 = no column, for
            rows that know fewer.
        log_probs: [..., k] natural logarithms of the probabilities there; any float dtype. What
            they do not add up to is the tail's.
        vocab_size: V, the columns of the whole row.
        temperature: that of the softmax which `log_probs` are of. A loss at another temperature
            undoes it, where the tail leaves no doubt how: "renormalize" and "uniform".
        tail: "bucket": all other columns are one outcome, on both sides, with the mass that is
            missing; "renormalize": they have nothing, and the known ones are scaled to sum 1;
            "uniform": they share the missing mass evenly; "drop": the known ones are taken as they
            are, of a teacher whose sum is below 1 (forward KL and its cross-entropy alone).
        log_rest: [...], the logarithm of the other columns' mass, if it is known. Else it is what
            the known columns leave of 1, but at least 2^-24 (2^-53 in float64): less than that
            their rounding hides.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that disagree, more columns than the vocabulary has, ids outside it or
            twice in a row, probabilities that add up to more than 1, an unknown tail. On an
            accelerator the values are not looked at, which would wait for it: a row with such ids
            is NaN. So it is inside `torch.compile`.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> logits = torch.tensor([[4.0, 3.0, 0.0, 1.0]])
        >>> teacher = ops.SparseTeacher.from_logits(logits, k=2)
        >>> teacher.ids
        tensor([[0, 1]], dtype=torch.int32)
        >>> ops.divergence(torch.zeros(1, 4), teacher, "forward_kl")
        tensor([0.4754])
    """

    ids: Tensor
    log_probs: Tensor
    vocab_size: int
    temperature: float = 1.0
    tail: str = "bucket"
    log_rest: Tensor | None = None
    _trusted: bool = field(default=False, repr=False)

    TAILS: ClassVar[tuple[str, ...]] = TAILS

    def __post_init__(self) -> None:
        ids, log_probs = self.ids, self.log_probs
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
            found = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"ids must be an int32 or int64 tensor, got {found}")
        if not isinstance(log_probs, Tensor) or not log_probs.is_floating_point():
            found = log_probs.dtype if isinstance(log_probs, Tensor) else type(log_probs).__name__
            raise TypeError(f"log_probs must be a floating-point tensor, got {found}")
        if ids.shape != log_probs.shape or ids.dim() < 1 or ids.shape[-1] == 0:
            raise ValueError(
                "ids and log_probs must both be [..., k] with k >= 1, got "
                f"{tuple(ids.shape)} and {tuple(log_probs.shape)}"
            )
        if ids.device != log_probs.device:
            raise ValueError(f"ids are on {ids.device}, log_probs on {log_probs.device}")
        if ids.shape[-1] > self.vocab_size:
            raise ValueError(
                f"k = {ids.shape[-1]} columns are more than the {self.vocab_size} of the vocabulary"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a positive number, got {self.temperature}")
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {self.tail!r}")
        rest = self.log_rest
        if rest is not None and (rest.shape != ids.shape[:-1] or not rest.is_floating_point()):
            raise ValueError(
                f"log_rest must be floating-point {tuple(ids.shape[:-1])}, one a row, got "
                f"{rest.dtype} {tuple(rest.shape)}"
            )
        if log_probs.dtype not in (torch.float32, torch.float64):
            object.__setattr__(self, "log_probs", log_probs.float())
        if not self._trusted and ids.is_cpu and not torch.compiler.is_compiling():
            self._check_values()
        if ids.dtype != torch.int32:
            # What 32 bits cannot hold is no column either, and is not to become one.
            outside = (ids < -1) | (ids > self.vocab_size)
            object.__setattr__(self, "ids", torch.where(outside, self.vocab_size, ids).int())
        object.__setattr__(self, "_trusted", False)  # of this object; another may be made of it

    def _check_values(self) -> None:
        k = self.ids.shape[-1]
        ids, log_probs = self.ids.reshape(-1, k), self.log_probs.reshape(-1, k)
        wrong = (ids < -1) | (ids >= self.vocab_size)
        if wrong.any():
            row, column = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"id {int(ids[row, column])} of row {row} is outside [0, {self.vocab_size}) and "
                "not -1 (no column)"
            )
        ordered = ids.sort(-1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if twice.any():
            row, column = (int(i) for i in twice.nonzero()[0])
            raise ValueError(f"id {int(ordered[row, column])} comes twice in row {row}")
        mass = torch.where(ids >= 0, log_probs, -torch.inf).exp().sum(-1, dtype=torch.float64)
        above = mass > 1 + _SLACK
        if self.log_rest is not None:
            above |= mass + self.log_rest.reshape(-1).exp() > 1 + _SLACK
        if above.any():
            row = int(above.nonzero()[0])
            raise ValueError(
                f"the probabilities of row {row} add up to {mass[row].item():.4g}: log_probs must "
                "be logarithms of a softmax over the whole row"
            )

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        *,
        k: int | None = None,
        p: float | None = None,
        temperature: float = 1.0,
        tail: str = "bucket",
        draws: int = 0,
        generator: torch.Generator | None = None,
    ) -> SparseTeacher:
        """The k largest probabilities of each row of `logits` [..., V], or as many of the largest
        as reach the mass `p` (and at most k, if both are given). No gradient flows to the logits.

        With `draws` and a k, so many draws from all other columns besides, with replacement: of
        what these have together each column gets the share that it was drawn, so nothing is left
        to the tail. Like `sample` an unbiased estimate of the teacher, for the kinds that are
        linear in it (forward KL, soft cross-entropy), and less noisy: what is certain is not drawn.

        Raises ValueError unless k in [1, V] or p in (0, 1] is given, and for draws < 0 or with p.
        """
        _check_logits(logits, temperature)
        columns = logits.shape[-1]
        if k is None and p is None:
            raise ValueError("from_logits needs k= (columns) or p= (mass)")
        if k is not None and not 1 <= k <= columns:
            raise ValueError(f"k must lie in [1, {columns}], got {k}")
        if p is not None and not 0 < p <= 1:
            raise ValueError(f"p must lie in (0, 1], got {p}")
        if draws < 0 or (draws > 0 and p is not None):
            raise ValueError(f"draws must be at least 0, and come with k alone, got {draws}")
        rows = logits.detach().reshape(-1, columns)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        uniform = rows.new_empty((len(rows), 0), dtype=torch.float64)
        if draws > 0:
            device = rows.device if generator is None else generator.device
            numbers = {"dtype": torch.float64, "device": device, "generator": generator}
            uniform = torch.rand(len(rows), draws, **numbers).sort(-1).values.to(rows.device)
        step = max(1, _ELEMENTS // columns)
        parts = [
            _largest(part, columns if k is None else k, p, temperature, of_part)
            for part, of_part in zip(rows.split(step), uniform.split(step), strict=True)
        ]
        width = max(part[0].shape[-1] for part in parts)
        ids = torch.cat([_widened(part[0], width, -1) for part in parts]).int()
        log_probs = torch.cat([_widened(part[1], width, -torch.inf) for part in parts])
        log_rest = torch.cat([part[2] for part in parts])
        if draws > 0:
            drawn = torch.cat([part[3] for part in parts])
            ids, log_probs, log_rest = _with_draws(ids, log_probs, log_rest, drawn, columns)
        shape, width = logits.shape[:-1], ids.shape[-1]
        return cls(
            ids.view(*shape, width),
            log_probs.to(wide).view(*shape, width),
            columns,
            temperature,
            tail,
            log_rest.to(wide).view(shape),
            _trusted=True,
        )

    @classmethod
    def sample(
        cls,
        logits: Tensor,
        draws: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> SparseTeacher:
        """`draws` columns of each row of `logits` [..., V], drawn from its softmax with
        replacement, each with the probability count / draws: an unbiased estimate of the teacher,
        of which the gradient of forward KL is the dense one on average (sampling KD, arXiv
        2503.16870).

        Draws are made from float64 probabilities. Raises ValueError for draws < 1.
        """
        _check_logits(logits, temperature)
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        columns, shape = logits.shape[-1], logits.shape[:-1]
        rows = logits.detach().reshape(-1, columns)
        parts = [
            torch.multinomial(
                torch.softmax(part.double() / temperature, -1), draws, True, generator=generator
            )
            for part in rows.split(max(1, _ELEMENTS // columns))
        ]
        ids = torch.cat(parts or [rows.new_empty(0, draws, dtype=torch.int64)])
        ids, log_probs = _counted(ids)
        width = max(1, int((ids >= 0).sum(-1).max())) if ids.numel() else 1
        ids, log_probs = ids[:, :width], log_probs[:, :width].float()
        shape = (*shape, width)
        return cls(
            ids.int().view(shape),
            log_probs.view(shape),
            columns,
            temperature,
            "drop",
            _trusted=True,
        )

    def packed(self) -> tuple[Tensor, Tensor]:
        """ids and log_probs as the kernels take them: what all other columns have, if it is known,
        is one more entry, of the id -2."""
        if self.log_rest is None:
            return self.ids, self.log_probs
        rest = self.log_rest[..., None].to(self.log_probs.dtype)
        return (
            torch.cat([self.ids, torch.full_like(rest, -2, dtype=torch.int32)], -1),
            torch.cat([self.log_probs, rest], -1),
        )

    def to_dense(self) -> Tensor:
        """Log-probabilities of all columns, [..., V]. A bucket is shared out evenly, as with
        "uniform"; under "renormalize" and "drop" the other columns have -inf."""
        present = self.ids >= 0
        known = torch.where(present, self.log_probs, -torch.inf)
        count = present.sum(-1, keepdim=True)
        other = torch.full_like(known[..., :1], -torch.inf)
        if self.tail in ("bucket", "uniform"):
            share = log_of_rest(known, self.log_rest) - (self.vocab_size - count).double().log()
            other = torch.where(count < self.vocab_size, share.to(known.dtype), -torch.inf)
        if self.tail == "renormalize":
            known = known - known.logsumexp(-1, keepdim=True)
        # One more column, for the ids that are none.
        shape = (*self.ids.shape[:-1], self.vocab_size + 1)
        dense = other.expand(shape).clone()
        places = torch.where(present, self.ids, self.vocab_size).long()
        return dense.scatter(-1, places, known)[..., :-1]


def log_of_rest(known: Tensor, log_rest: Tensor | None) -> Tensor:
    """[..., 1] of log-probabilities [..., k] that are -inf where there is no column."""
    if log_rest is not None:
        return log_rest[..., None]
    least = 2.0**-53 if known.dtype == torch.float64 else 2.0**-24
    return (1 - known.exp().sum(-1, keepdim=True, dtype=torch.float64)).clamp(min=least).log()


def _check_logits(logits: Tensor, temperature: float) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        found = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be a floating-point tensor, got {found}")
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V >= 1, got {tuple(logits.shape)}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, got {temperature}")


def _largest(
    logits: Tensor, k: int, p: float | None, temperature: float, uniform: Tensor
) -> tuple[Tensor, ...]:
    """ids and log-probabilities [n, <= k] of the largest columns of each row, of `p` as many as it
    takes, and the log mass of the others [n, 1]."""
    if p is None:
        return _largest_k(logits, k, temperature, uniform)
    x = logits.double() / temperature
    log_sum = x.logsumexp(-1, keepdim=True)
    count = min(k, 64)
    while True:
        # By the logits themselves: quotients of different ones may be equal.
        ids = logits.topk(count, -1).indices
        log_probs = x.gather(-1, ids) - log_sum
        mass = log_probs.exp().cumsum(-1)
        if count == k or not bool((mass[:, -1] < p).any()):
            needed = mass < p
            needed = torch.cat([torch.ones_like(needed[:, :1]), needed[:, :-1]], -1)
            width = max(1, int(needed.sum(-1).max())) if len(needed) else 1
            ids = torch.where(needed, ids, -1)[:, :width]
            log_probs = torch.where(needed, log_probs, -torch.inf)[:, :width]
            break
        count = min(k, 4 * count)
    # A column more, for the ids that are none.
    others = torch.cat([x, torch.full_like(log_sum, -torch.inf)], -1)
    others.scatter_(-1, torch.where(ids < 0, x.shape[-1], ids), -torch.inf)
    return ids, log_probs, others.logsumexp(-1, keepdim=True) - log_sum


def _largest_k(logits: Tensor, k: int, temperature: float, uniform: Tensor) -> tuple[Tensor, ...]:
    """The same for a k; on the CPU by a kernel: a capture is not to cost what a teacher does. With
    ascending numbers `uniform` [n, d] in [0, 1) a fourth, d of the other columns, drawn."""
    if logits.is_cpu:
        ids, log_probs, log_rest, drawn = torch.ops.stillhouse.largest(
            logits, k, float(temperature), uniform
        )
        return ids, log_probs, log_rest[:, None], drawn
    ids = logits.topk(k, -1).indices
    x = logits.double() / temperature
    known, others = x.gather(-1, ids), x.scatter_(-1, ids, -torch.inf)
    log_rest = others.logsumexp(-1, keepdim=True)
    log_sum = torch.logaddexp(known.logsumexp(-1, keepdim=True), log_rest)
    drawn = ids[:, :0]
    if uniform.shape[-1] > 0:
        upto = (others - log_rest).exp().cumsum(-1)
        drawn = torch.searchsorted(upto, uniform * upto[:, -1:], right=True)
        drawn = torch.where(log_rest > -torch.inf, drawn.clamp(max=x.shape[-1] - 1), -1)
    return ids, known - log_sum, log_rest - log_sum, drawn


def _with_draws(
    ids: Tensor, log_probs: Tensor, log_rest: Tensor, drawn: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, log_probs and log_rest with what the others have shared out to the drawn ones."""
    drawn, log_share = _counted(drawn)
    # What is left to the others where nothing could be drawn, their mass being next to nothing.
    rest = torch.where(drawn[:, :1] >= 0, -torch.inf, log_rest)
    ids = torch.cat([ids, drawn], -1)
    log_probs = torch.cat([log_probs, log_rest + log_share.to(log_rest.dtype)], -1)
    if ids.shape[-1] > columns:  # more than there are, but not in any row
        log_probs, order = log_probs.sort(dim=-1, descending=True, stable=True)
        ids, log_probs = ids.gather(-1, order)[:, :columns], log_probs[:, :columns]
    return ids, log_probs, rest


def _counted(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [n, d] of draws, -1 for none, each once with the logarithm of its share of the d; the
    places that this leaves empty at the end, -1 and -inf."""
    ids, draws = drawn.int().sort(-1).values, drawn.shape[-1]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = first.cumsum(-1) - 1
    count = torch.zeros_like(ids, dtype=torch.float64).scatter_add_(-1, place, (ids >= 0).double())
    unique = torch.full_like(ids, -1).scatter(-1, place, ids)
    return unique, (count / draws).log()


def _widened(x: Tensor, width: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=fill)
