"""Losses of two players, and a gradient turned around: what codecs, converters and score
distillation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, relu, softplus

Scores = Tensor | Sequence[Tensor]

# What a score costs: (a real one, the discriminator), (a fake one, the discriminator), (a fake one,
# the generator).
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "lsgan": (lambda s: (1 - s).square(), lambda s: s.square(), lambda s: (1 - s).square()),
    "hinge": (lambda s: relu(1 - s), lambda s: relu(1 + s), lambda s: -s),
    "softplus": (lambda s: softplus(-s), softplus, lambda s: softplus(-s)),
    "bce": (
        lambda p: binary_cross_entropy(p, torch.ones_like(p), reduction="none"),
        lambda p: binary_cross_entropy(p, torch.zeros_like(p), reduction="none"),
        lambda p: binary_cross_entropy(p, torch.ones_like(p), reduction="none"),
    ),
}


def discriminator_loss(
    real: Scores, fake: Scores, form: str = "lsgan", mask: Tensor | Sequence[Tensor] | None = None
) -> Tensor:
    """What a discriminator loses: the mean over real scores plus the mean over fake ones, summed
    over discriminators where they are several.

        lsgan      (1 - D(x))^2            + D(y)^2               (arXiv 1611.04076)
        hinge      max(0, 1 - D(x))        + max(0, 1 + D(y))     (arXiv 1705.02894)
        softplus   -log sigmoid(D(x))      - log(1 - sigmoid(D(y)))
        bce        -log D(x)               - log(1 - D(y))        D a probability (arXiv 1406.2661)

    real, fake: scores of any shape, or a list with a tensor for each discriminator. The fakes are
    the caller's to detach. mask: bool in the scores' shape (a list with lists), True = counts, of
    both sides, which then have the same shapes.
    Raises ValueError for another form, lists of unequal lengths and a mask that does not fit.

    Example:
        >>> import torch
        >>> from stillhouse.nn import discriminator_loss
        >>> discriminator_loss(torch.tensor([0.5, 1.0]), torch.tensor([0.5]))
        tensor(0.3750)
    """
    of_real, of_fake, _ = _form(form)
    sides = (_listed(real), _listed(fake))
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"scores of {len(sides[0])} discriminators and of {len(sides[1])}")
    return _total(sides[0], of_real, mask) + _total(sides[1], of_fake, mask)


def generator_loss(
    fake: Scores, form: str = "lsgan", mask: Tensor | Sequence[Tensor] | None = None
) -> Tensor:
    """What the generator loses, the mean over the scores of its fakes, summed over discriminators:
    (1 - D(y))^2, -D(y), -log sigmoid(D(y)) and -log D(y) in the forms of `discriminator_loss`,
    whose arguments and errors these are. The last two do not saturate.

    Example:
        >>> import torch
        >>> from stillhouse.nn import generator_loss
        >>> generator_loss([torch.tensor([0.5]), torch.tensor([2.0])], "hinge")
        tensor(-2.5000)
    """
    return _total(_listed(fake), _form(form)[2], mask)


class GradientReversal(nn.Module):
    """The identity, whose gradient is -scale times what comes (arXiv 1409.7495): what is above it
    learns to tell something from its input, what is below learns to hide it.

    scale may be set anew each step. Raises ValueError where it is negative or not finite.

    Example:
        >>> import torch
        >>> from stillhouse.nn import GradientReversal
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> y = GradientReversal(0.5)(x).square()
        >>> y.backward()
        >>> y.item(), x.grad.item()
        (9.0, -3.0)
    """

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    @property
    def scale(self) -> float:
        """How much of the gradient is turned around."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        if not 0 <= scale < float("inf"):
            raise ValueError(f"scale must be a number >= 0 (the sign is ours), got {scale}")
        self._scale = float(scale)

    def forward(self, x: Tensor) -> Tensor:
        return _Reversed.apply(x, self._scale)

    def extra_repr(self) -> str:
        return f"scale={self._scale:g}"


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.scale * gradient, None


def _form(form: str) -> tuple[Callable[[Tensor], Tensor], ...]:
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    return FORMS[form]


def _listed(scores: Scores) -> list[Tensor]:
    scores = [scores] if isinstance(scores, Tensor) else list(scores)
    if not scores:
        raise ValueError("no scores: expected a tensor, or one for each discriminator")
    return scores


def _total(
    scores: list[Tensor],
    cost: Callable[[Tensor], Tensor],
    mask: Tensor | Sequence[Tensor] | None,
) -> Tensor:
    masks = [None] * len(scores) if mask is None else _listed(mask)
    if len(masks) != len(scores):
        raise ValueError(f"scores of {len(scores)} discriminators and {len(masks)} masks")
    terms = [_mean(cost, each, of_it) for each, of_it in zip(scores, masks, strict=True)]
    return sum(terms[1:], terms[0])


def _mean(cost: Callable[[Tensor], Tensor], score: Tensor, mask: Tensor | None) -> Tensor:
    """Over what counts; 0 with a zero gradient where nothing does."""
    if mask is None:
        return cost(score).mean()
    if mask.dtype != torch.bool or mask.shape != score.shape:
        raise ValueError(
            f"mask must be bool {tuple(score.shape)}, True = counts, got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    # Before the cost: the slope at a NaN would be one, however it is weighted.
    counted = torch.where(mask, score, 0.5)
    return torch.where(mask, cost(counted), 0).sum() / mask.sum().clamp(min=1)
