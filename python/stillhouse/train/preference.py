"""Losses from pairs of which one is preferred, on the log-probabilities of whole sequences."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def preference_loss(
    policy: Tensor,
    reference: Tensor,
    *,
    kind: Literal["sigmoid", "kto_pair", "hinge", "ipo"] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """The loss that moves a policy towards the first of two sequences, against a reference.

    policy, reference: [B, 2] sequence log-probabilities (`sequence_logprobs`), the preferred one
    first; no gradient flows to the reference. With r = policy - reference, r+ and r- its columns
    and D = r+ - r-, the mean over pairs of

    - "sigmoid": -(1 - s) log sigmoid(beta D) - s log sigmoid(-beta D), s = label_smoothing (DPO,
      arXiv 2305.18290);
    - "hinge": max(0, 1 - beta D) (SLiC, arXiv 2305.10425);
    - "ipo": (D - 1 / (2 beta))^2 (arXiv 2310.12036; it is meant for log-probabilities that are
      means over tokens);
    - "kto_pair": (1 - sigmoid(beta (r+ - K-)) + 1 - sigmoid(beta (K+ - r-))) / 2, K+ and K- the
      batch means of r+ and r-, at least 0 and without a gradient (after KTO, arXiv 2402.01306;
      released code lets the gradient through K).

    Returns `loss`, and without a gradient `preferred_reward` and `other_reward`, the means of
    beta r+ and beta r-, `margin`, that of beta D, and `accuracy`, the share of pairs with D > 0.
    An empty batch has the loss 0. Raises ValueError for other shapes or kinds, beta that is not
    positive, label_smoothing outside [0, 0.5) or with another kind than "sigmoid", and a reference
    that requires a gradient.

    Defaults: beta 0.1 (the DPO paper).

    Example:
        >>> import torch
        >>> from stillhouse.train import preference_loss
        >>> same = torch.tensor([[-10.0, -12.0]])
        >>> round(preference_loss(same, same)["loss"].item(), 6)
        0.693147
    """
    if kind not in ("sigmoid", "kto_pair", "hinge", "ipo"):
        raise ValueError(f"kind must be sigmoid, kto_pair, hinge or ipo, got {kind!r}")
    if policy.dim() != 2 or policy.shape[1] != 2 or policy.shape != reference.shape:
        raise ValueError(
            "policy and reference must be [B, 2], the preferred sequence first, got "
            f"{tuple(policy.shape)} and {tuple(reference.shape)}"
        )
    if reference.requires_grad:
        raise ValueError("no gradient flows to the reference: detach it")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be a positive number, got {beta}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and kind != "sigmoid"):
        raise ValueError(
            f"label_smoothing is of 'sigmoid', in [0, 0.5), got {label_smoothing} with {kind!r}"
        )
    preferred, other = (policy - reference).unbind(1)
    difference = preferred - other
    scaled = beta * difference
    if kind == "sigmoid":
        kept, swapped = logsigmoid(scaled), logsigmoid(-scaled)
        per_pair = -(1 - label_smoothing) * kept - label_smoothing * swapped
    elif kind == "hinge":
        per_pair = (1 - scaled).clamp(min=0)
    elif kind == "ipo":
        per_pair = (difference - 1 / (2 * beta)) ** 2
    else:
        above, below = (_mean(x.detach()).clamp(min=0) for x in (preferred, other))
        gained = 1 - torch.sigmoid(beta * (preferred - below))
        lost = 1 - torch.sigmoid(beta * (above - other))
        per_pair = (gained + lost) / 2
    return {
        "loss": _mean(per_pair),
        "preferred_reward": _mean(beta * preferred).detach(),
        "other_reward": _mean(beta * other).detach(),
        "margin": _mean(scaled).detach(),
        "accuracy": _mean((difference.detach() > 0).to(difference.dtype)),
    }


def _mean(x: Tensor) -> Tensor:
    return x.sum() / max(x.numel(), 1)
