"""The divergences as values: a small frozen dataclass each, with its parameters.

With student q = softmax(z / T) and teacher p = softmax(t / T). A parameter is a float, or a 0-d
tensor where it changes during training under `torch.compile` (a float would recompile).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import ClassVar

import torch

Number = float | torch.Tensor


@dataclass(frozen=True)
class Kind:
    """A divergence D(teacher, student) of two rows of logits."""

    number: ClassVar[int]  # of the kernel's table, csrc/divergence/math.h
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                if value.numel() != 1:
                    raise ValueError(
                        f"{type(self).__name__}.{field.name} must be one number, "
                        f"got a tensor of shape {tuple(value.shape)}"
                    )
            elif not self._allowed(value):
                raise ValueError(
                    f"{type(self).__name__}.{field.name} must lie in {self._interval}, got {value}"
                )

    _interval: ClassVar[str] = "(0, 1)"

    def _allowed(self, value: float) -> bool:
        return 0 < value < 1

    @property
    def parameter(self) -> Number:
        """The one number the kernel's scalar functions take; 0 for kinds without."""
        own = fields(self)
        return getattr(self, own[0].name) if own else 0.0

    def exchanged(self) -> Kind:
        """The kind E with E(student, teacher) = D(teacher, student): its student gradient is the
        gradient of D to the teacher. Raises ValueError for a kind whose teacher is a constant."""
        raise ValueError(
            f"{type(self).__name__} has no gradient to the teacher: detach the teacher's logits"
        )


@dataclass(frozen=True)
class ForwardKL(Kind):
    """KL(p || q) = sum p (log p - log q): Hinton's divergence, it covers the teacher's modes."""

    number = 1

    def exchanged(self) -> Kind:
        return ReverseKL()


@dataclass(frozen=True)
class ReverseKL(Kind):
    """KL(q || p) = sum q (log q - log p): it seeks modes (MiniLLM, arXiv 2306.08543)."""

    number = 2

    def exchanged(self) -> Kind:
        return ForwardKL()


@dataclass(frozen=True)
class JSD(Kind):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649).

    JSD / beta tends to forward KL for beta -> 0, JSD / (1 - beta) to reverse KL for beta -> 1; beta
    itself lies in (0, 1), so that no limit is taken in silence.
    """

    number = 3
    beta: Number = 0.5

    def exchanged(self) -> Kind:
        return JSD(1 - self.beta)


@dataclass(frozen=True)
class SkewKL(Kind):
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898; alpha = 0.1 there)."""

    number = 4
    alpha: Number = 0.1

    def exchanged(self) -> Kind:
        return SkewReverseKL(self.alpha)


@dataclass(frozen=True)
class SkewReverseKL(Kind):
    """KL(q || (1 - alpha) p + alpha q) (DistiLLM, arXiv 2402.03898; alpha = 0.1 there)."""

    number = 5
    alpha: Number = 0.1

    def exchanged(self) -> Kind:
        return SkewKL(self.alpha)


@dataclass(frozen=True)
class TAID(Kind):
    """-sum p_t log q with p_t = softmax((1 - t) z + t * teacher), the student's part detached.

    TAID, arXiv 2501.16937. The value is the cross-entropy to the moving target, the gradient
    q - p_t: zero at t = 0, that of forward KL at t = 1.
    """

    number = 6
    t: Number

    _interval = "[0, 1]"

    def _allowed(self, value: float) -> bool:
        return 0 <= value <= 1


@dataclass(frozen=True)
class TVD(Kind):
    """sum |p - q| / 2, one minus the acceptance rate of speculative sampling."""

    number = 7

    def exchanged(self) -> Kind:
        return TVD()


@dataclass(frozen=True)
class CrossEntropy(Kind):
    """-log q_y for labels y, or with smoothing s: the target (1 - s) onehot(y) + s uniform, uniform
    over the columns whose logit is not -inf. It has no teacher; label -100 = row not counted."""

    number = 0
    needs_teacher = False
    label_smoothing: Number = 0.0

    _interval = "[0, 1)"

    def _allowed(self, value: float) -> bool:
        return 0 <= value < 1


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


KINDS: dict[str, type[Kind]] = {
    _snake_case(kind.__name__): kind
    for kind in (ForwardKL, ReverseKL, JSD, SkewKL, SkewReverseKL, TAID, TVD, CrossEntropy)
}


def as_kind(kind: str | Kind) -> Kind:
    """A kind from its snake-case name with default parameters, or the kind itself.

    Raises:
        ValueError: an unknown name, or a kind that has no default (`"taid"` needs its t).
        TypeError: neither a string nor a kind.
    """
    if isinstance(kind, Kind):
        return kind
    if not isinstance(kind, str):
        raise TypeError(f"kind must be a string or an ops.Kind, got {type(kind).__name__}")
    if kind not in KINDS:
        raise ValueError(f"unknown divergence {kind!r}: expected one of {', '.join(KINDS)}")
    if kind == "taid":
        raise ValueError("'taid' has no default weight: pass ops.TAID(t) with t in [0, 1]")
    return KINDS[kind]()
