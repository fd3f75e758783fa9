"""The divergences as values: a small frozen dataclass each, with its parameters.

With student q = softmax(z / T) and teacher p = softmax(t / T). A parameter is a float, or a 0-d
tensor where it changes during training under `torch.compile` (a float would recompile).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import ClassVar

import torch

Number = float | torch.Tensor


@dataclass(frozen=True)
class Kind:
    """A divergence D(teacher, student) of two rows of logits."""

    number: ClassVar[int]  # of the kernel's table, csrc/divergence/math.h
    variant: ClassVar[int | None] = None  # number of another kernel that serves some instances
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    pairs_columns: ClassVar[bool] = True  # a column of one side belongs to that of the other
    sparse_tails: ClassVar[tuple[str, ...]] = ()  # of a SparseTeacher it can be taken to
    # Its gradient is linear in p: that of drawn columns is the dense one on average.
    linear_in_teacher: ClassVar[bool] = False
    # A sum over columns of what their two probabilities make, or a function of such a sum: columns
    # may be split over processes (stillhouse.distributed).
    sums_over_columns: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                if value.numel() != 1:
                    raise ValueError(
                        f"{type(self).__name__}.{field.name} must be one number, "
                        f"got a tensor of shape {tuple(value.shape)}"
                    )
            elif not isinstance(value, bool) and not self._allowed(value):
                raise ValueError(
                    f"{type(self).__name__}.{field.name} must lie in {self._interval}, got {value}"
                )

    _interval: ClassVar[str] = "(0, 1)"

    def _allowed(self, value: float) -> bool:
        return 0 < value < 1

    @property
    def parameters(self) -> tuple[Number, Number]:
        """The numbers that the kernel's scalar functions take; 0 for those that a kind has not."""
        own = [getattr(self, f.name) for f in fields(self) if f.type != "bool"]
        a, b = (*own, 0.0, 0.0)[:2]
        return a, b

    @property
    def kernel_number(self) -> int:
        """Of the kernel that serves this instance."""
        return self.number

    def factor(self, columns: int) -> Number:
        """Of the divergence, in value and gradient, for rows of so many columns."""
        return 1.0

    # The name of the kind E with E(student, teacher) = D(teacher, student), and its parameters from
    # D's: the student gradient of E is the gradient of D to the teacher.
    _mirror: ClassVar[str | None] = None

    @staticmethod
    def _mirrored(a: Number, b: Number) -> tuple[Number, Number]:
        return a, b

    @classmethod
    def exchange(cls, a: Number, b: Number) -> tuple[type[Kind], Number, Number]:
        """The kind with student and teacher exchanged, and its parameters. Raises ValueError for a
        kind without a gradient to the teacher."""
        if cls._mirror is None:
            raise ValueError(f"{cls.__name__} has no gradient to the teacher: detach its logits")
        return KINDS[cls._mirror], *cls._mirrored(a, b)


# Tails of sparse teachers: of any, of those that leave each column its probability, of those whose
# probabilities are above 0.
_ANY = ("bucket", "renormalize", "uniform", "drop")
_WHOLE, _POSITIVE = _ANY[:3], ("bucket", "uniform")


def _complement(a: Number, b: Number) -> tuple[Number, Number]:
    return 1 - a, b


@dataclass(frozen=True)
class ForwardKL(Kind):
    """KL(p || q) = sum p (log p - log q): Hinton's divergence, it covers the teacher's modes."""

    number = 1
    sums_over_columns = True
    sparse_tails = _ANY
    linear_in_teacher = True
    _mirror = "reverse_kl"


@dataclass(frozen=True)
class ReverseKL(Kind):
    """KL(q || p) = sum q (log q - log p): it seeks modes (MiniLLM, arXiv 2306.08543)."""

    number = 2
    sums_over_columns = True
    sparse_tails = _POSITIVE
    _mirror = "forward_kl"


@dataclass(frozen=True)
class JSD(Kind):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649).

    JSD / beta tends to forward KL for beta -> 0, JSD / (1 - beta) to reverse KL for beta -> 1; beta
    itself lies in (0, 1), so that no limit is taken in silence. `normalize` divides by
    min(beta, 1 - beta), so that both limits have the size of a KL.
    """

    number = 3
    sums_over_columns = True
    sparse_tails = _WHOLE
    _mirror = "jsd"
    _mirrored = staticmethod(_complement)
    beta: Number = 0.5
    normalize: bool = False

    def factor(self, columns: int) -> Number:
        if not self.normalize:
            return 1.0
        smaller = torch.minimum if isinstance(self.beta, torch.Tensor) else min
        return 1 / smaller(self.beta, 1 - self.beta)


@dataclass(frozen=True)
class SkewKL(Kind):
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898; alpha = 0.1 there)."""

    number = 4
    sums_over_columns = True
    sparse_tails = _WHOLE
    _mirror = "skew_reverse_kl"
    alpha: Number = 0.1


@dataclass(frozen=True)
class SkewReverseKL(Kind):
    """KL(q || (1 - alpha) p + alpha q) (DistiLLM, arXiv 2402.03898; alpha = 0.1 there)."""

    number = 5
    sums_over_columns = True
    sparse_tails = _WHOLE
    _mirror = "skew_kl"
    alpha: Number = 0.1


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
    sums_over_columns = True
    sparse_tails = _WHOLE
    _mirror = "tvd"


@dataclass(frozen=True)
class SoftCrossEntropy(Kind):
    """-sum p log q: the gradient of forward KL, and its value plus the teacher's entropy."""

    number = 8
    sums_over_columns = True
    sparse_tails = _ANY
    linear_in_teacher = True


@dataclass(frozen=True)
class SymmetricKL(Kind):
    """(1 - weight) KL(p || q) + weight KL(q || p); weight 0.5 is half of Jeffreys' divergence."""

    number = 9
    sums_over_columns = True
    sparse_tails = _POSITIVE
    _mirror = "symmetric_kl"
    _mirrored = staticmethod(_complement)
    weight: Number = 0.5


@dataclass(frozen=True)
class AdaptiveKL(Kind):
    """(1 - w) KL(p || q) + w KL(q || p), w the share of sum |p - q| that lies outside the teacher's
    head, a constant for the gradient (AKL, arXiv 2404.02657, eq. 8).

    The head: the teacher's largest probabilities, in order, as long as their sum stays within `mu`,
    and at least the first; equal ones by column.
    """

    number = 20
    mu: Number = 0.5


@dataclass(frozen=True)
class DKD(Kind):
    """alpha KL of {y, the rest} + beta KL of the columns other than the label y, each side with sum
    1 there (TCKD and NCKD of decoupled knowledge distillation, arXiv 2203.08679, eq. 7).

    Needs `labels`; -100 = row not counted. (1, 1 - p_y) would be forward KL. NaN for a row whose
    only finite column is the label's.
    """

    number = 21
    needs_labels = True
    alpha: Number = 1.0
    beta: Number = 8.0

    _interval = "the finite numbers from 0 on"

    def _allowed(self, value: float) -> bool:
        return 0 <= value < math.inf


@dataclass(frozen=True)
class Hellinger(Kind):
    """sum (sqrt p - sqrt q)^2, the squared distance without the factor 1/2: in [0, 2]."""

    number = 10
    sums_over_columns = True
    sparse_tails = _WHOLE
    _mirror = "hellinger"


@dataclass(frozen=True)
class Chi2(Kind):
    """sum (p - q)^2 / q = sum p^2 / q - 1 (Pearson). Infinite where q underflows and p does not:
    in float32 beyond a gap of 88 nats."""

    number = 11
    sums_over_columns = True
    sparse_tails = _WHOLE


@dataclass(frozen=True)
class LogAcceptance(Kind):
    """-log sum min(p, q): of the acceptance rate of speculative sampling. Right to 1e-7."""

    number = 12
    sums_over_columns = True
    sparse_tails = _WHOLE
    _mirror = "log_acceptance"


@dataclass(frozen=True)
class AlphaBeta(Kind):
    """-1 / (alpha beta) sum [p^alpha q^beta - alpha / s p^s - beta / s q^s], s = alpha + beta, and
    its limits where alpha, beta or s is exactly 0 (ABKD, arXiv 2505.04560; the limits by
    continuity: divided by alpha^2 and beta^2).

    (1, 0) is forward KL, (0, 1) reverse KL, (1, 1) half the squared distance of p and q, (a, 1 - a)
    `Amari(a)`, (0, 0) half the squared distance of the log-probabilities. Powers of e^88 are
    infinite in float32.
    """

    number = 13
    sums_over_columns = True
    sparse_tails = _POSITIVE
    variant = 23
    _mirror = "alpha_beta"
    _mirrored = staticmethod(lambda a, b: (b, a))
    alpha: Number = 0.2
    beta: Number = 0.7

    _interval = "the finite numbers"

    def _allowed(self, value: float) -> bool:
        return abs(value) < math.inf

    @property
    def kernel_number(self) -> int:
        # Only what is known when compiling may choose a kernel.
        known = not isinstance(self.alpha, torch.Tensor) and not isinstance(self.beta, torch.Tensor)
        return self.number if known and self.alpha > 0 and self.beta > 0 else self.variant


@dataclass(frozen=True)
class Amari(Kind):
    """[sum p^alpha q^(1 - alpha) - 1] / (alpha (alpha - 1)); it tends to forward KL for
    alpha -> 1 and to reverse KL for alpha -> 0 (Amari, 1985)."""

    number = 14
    sums_over_columns = True
    sparse_tails = _POSITIVE
    _mirror = "amari"
    _mirrored = staticmethod(_complement)
    alpha: Number = 0.5

    _interval = "the finite numbers other than 0 and 1 (the limits reverse_kl and forward_kl)"

    def _allowed(self, value: float) -> bool:
        return abs(value) < math.inf and value not in (0, 1)


@dataclass(frozen=True)
class Renyi(Kind):
    """log sum p^alpha q^(1 - alpha) / (alpha - 1) (Renyi, 1961). Its gradient is q minus the
    softmax of alpha log p + (1 - alpha) log q, that of `TAID(alpha)` for alpha <= 1."""

    number = 15
    sums_over_columns = True
    sparse_tails = _WHOLE
    alpha: Number = 0.5

    _interval = "the finite positive numbers other than 1 (the limit forward_kl)"

    def _allowed(self, value: float) -> bool:
        return 0 < value < math.inf and value != 1


@dataclass(frozen=True)
class ULD(Kind):
    """sum_k |q_(k) - p_(k)|, both sides in descending order, the shorter continued by zeros: the
    Wasserstein distance of the two multisets of probabilities (universal logit distillation,
    arXiv 2402.12030, eq. 6). The vocabularies may differ, in size and in what a column stands for.
    """

    number = 22
    _mirror = "uld"
    pairs_columns = False


@dataclass(frozen=True)
class MSELogits(Kind):
    """sum (z - t)^2 / V of tempered logits, of logits without their row's mean (`of="centered"`:
    what a constant offset does not change), or of log-probabilities (`of="log_probs"`). Columns
    that are -inf on both sides add nothing."""

    number = 16
    variant = 24
    _mirror = "mse_logits"
    of: str = "logits"

    def __post_init__(self) -> None:
        if self.of not in ("logits", "centered", "log_probs"):
            raise ValueError(
                f'MSELogits.of must be "logits", "centered" or "log_probs", got {self.of!r}'
            )

    @property
    def kernel_number(self) -> int:
        return self.variant if self.of == "log_probs" else self.number

    @property
    def sums_over_columns(self) -> bool:
        return self.of == "log_probs"

    @property
    def parameters(self) -> tuple[Number, Number]:
        return float(self.of == "centered"), 0.0

    def factor(self, columns: int) -> Number:
        return 1.0 / columns


@dataclass(frozen=True)
class CosineLogits(Kind):
    """1 - <z, t> / (|z| |t|); the temperature cancels. NaN for a row of zeros."""

    number = 17
    _mirror = "cosine_logits"


@dataclass(frozen=True)
class CosineProbs(Kind):
    """1 - <q, p> / (|q| |p|)."""

    number = 18
    _mirror = "cosine_probs"


@dataclass(frozen=True)
class StandardizedKL(Kind):
    """Forward KL of softmax(N(z) / T) with N(x) = (x - mean x) / std x of each row, the standard
    deviation with V - 1 (logit standardisation, arXiv 2403.01427). NaN for a constant row."""

    number = 19


@dataclass(frozen=True)
class SupportKL(Kind):
    """KL(p || q) of the columns that a `SparseTeacher` knows, both sides with sum 1 there: no other
    column is read or gets a gradient. What it leaves free is all that lies outside."""

    number = 25
    sparse_tails = _ANY


@dataclass(frozen=True)
class CrossEntropy(Kind):
    """-log q_y for labels y, or with smoothing s: the target (1 - s) onehot(y) + s uniform, uniform
    over the columns whose logit is not -inf. It has no teacher; label -100 = row not counted."""

    number = 0
    needs_teacher = False
    needs_labels = True
    label_smoothing: Number = 0.0

    _interval = "[0, 1)"

    def _allowed(self, value: float) -> bool:
        return 0 <= value < 1


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


KINDS: dict[str, type[Kind]] = {_snake_case(k.__name__): k for k in Kind.__subclasses__()}


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
