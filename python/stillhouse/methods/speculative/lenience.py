"""Lossy speculative decoding: more of the draft is kept than the target's law allows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.ops.random import ACCEPT, FINAL, philox_uniform

# f(p, epsilon) >= p, with equality at epsilon = 1.
LENIENCE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "linear": lambda p, epsilon: p / epsilon,
    "square": lambda p, epsilon: p / epsilon**2,
    "exponential": lambda p, epsilon: p**epsilon,
}


def lenient_law(p: Tensor, q: Tensor, epsilon: float, kind: str = "linear") -> Tensor:
    """The law of a token of lossy speculative decoding: for epsilon < 1 not the target's.

    p, q: probabilities [..., V] of the target and the draft model. A draft x is kept with
    min(1, f(p(x), epsilon) / q(x)), else the token comes from the residual max(0, p - q):

        P(x) = min(q, f) + (1 - sum min(q, f)) max(0, p - q) / sum max(0, p - q)

    kind: "linear" f = p / epsilon, "square" f = p / epsilon^2, "exponential" f = p^epsilon.
    Returns [..., V] in the wider of both dtypes. Raises ValueError for epsilon outside (0, 1], an
    unknown kind, and rows that are no probabilities.

    Defaults: kind linear, no epsilon: the paper sweeps it, and 1 is lossless.

    Example:
        >>> import torch
        >>> from stillhouse.methods.speculative import lenient_law
        >>> p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.5])
        >>> lenient_law(p, q, epsilon=0.5)
        tensor([0.5000, 0.3000, 0.2000])
    """
    f = _lenience(epsilon, kind)
    if p.shape != q.shape:
        raise ValueError(f"p and q need one shape [..., V], got {list(p.shape)}, {list(q.shape)}")
    _check_probabilities(p=p, q=q)
    kept = torch.minimum(q, f(p))
    residual = (p - q).clamp_min(0)
    mass = residual.sum(-1, keepdim=True)
    # Without a residual p is q, and nothing is left to be emitted from it.
    share = torch.where(mass > 0, residual / mass, torch.zeros_like(residual))
    return kept + (1 - kept.sum(-1, keepdim=True)) * share


def lenient_chain(
    tokens: Tensor,
    target: Tensor,
    draft: Tensor,
    epsilon: float,
    kind: str = "linear",
    *,
    seed: int | Tensor,
    position: int | Tensor = 0,
    temperature: float = 1.0,
    is_prob: bool = False,
) -> ops.VerifyOut:
    """Verify chains of drafted tokens leniently. Lossy: the output's law is `lenient_law`'s, unless
    epsilon is 1, where it is the target's, and that of `ops.tree_verify`, mode "multi_round".

    tokens: int [B, T], node 0 the last committed token, the T - 1 drafted ones behind it. target:
    [B, T, V], row i what the target says after node i. draft: [B, T, V], row i the law that node
    i + 1 was drawn from; the last row is not read. Logits, or probabilities with `is_prob`; the
    temperature divides both sides' logits. epsilon, kind: as in `lenient_law`. seed, position: int
    or int64 [B]; they decide everything, as in `ops.tree_verify`. Plain torch, on any device.
    Returns `ops.VerifyOut`; accept_prob is the mean acceptance probability of the tokens that were
    looked at, status is 0.
    Raises ValueError for epsilon outside (0, 1], an unknown kind, shapes that do not fit together,
    tokens outside the vocabulary, a temperature that is not above 0 and rows that are not finite.

    Defaults: kind linear, temperature 1; no epsilon: the paper sweeps it.

    Example:
        >>> import torch
        >>> from stillhouse.methods.speculative import lenient_chain
        >>> p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.5])
        >>> rows = p.expand(1, 3, 3), q.expand(1, 3, 3)
        >>> out = lenient_chain(torch.tensor([[0, 0, 1]]), *rows, 0.5, seed=0, is_prob=True)
        >>> out.n_accepted.item(), out.out_tokens[0, :2].tolist()  # p >= q: kept for certain
        (2, [0, 1])
    """
    f = _lenience(epsilon, kind)
    p, q = _rows(tokens, target, draft, temperature, is_prob)
    batch, size = tokens.shape
    tokens = tokens.long()
    drafted = tokens[:, 1:, None]
    p_drafted, q_drafted = (x.gather(-1, drafted)[..., 0] for x in (p[:, :-1], q[:, :-1]))
    nodes = torch.arange(size, device=tokens.device)
    key = [torch.as_tensor(x, device=tokens.device).reshape(-1, 1) for x in (seed, position)]
    coin = philox_uniform(*key, nodes[1:], ACCEPT).expand(batch, -1)
    kept = coin * q_drafted < f(p_drafted)
    accepted = kept.long().cumprod(1).sum(1)
    final = accepted[:, None]
    rows = torch.arange(batch, device=tokens.device)
    p_last, q_last = p[rows, accepted], q[rows, accepted]
    residual = (p_last - q_last).clamp_min(0)
    # Nothing was rejected behind a chain that was kept whole: its last row is the target's own.
    whole = (final == size - 1) | (residual.sum(1, keepdim=True) <= 0)
    cumulated = torch.where(whole, p_last, residual).cumsum(1)
    u = philox_uniform(*key, final, FINAL) * cumulated[:, -1:]
    token = torch.searchsorted(cumulated, u, right=True)
    is_kept = nodes <= final
    following = torch.where(nodes < final, tokens.roll(-1, 1), -1)
    out = following.scatter(1, final, token)
    # A token is looked at where all before it were kept.
    seen = nodes[1:] <= final
    probability = (f(p_drafted) / q_drafted).clamp_max(1).where(seen & (q_drafted > 0), 0).sum(1)
    return ops.VerifyOut(
        n_accepted=accepted.int(),
        path=torch.where(is_kept, nodes, -1).int(),
        out_tokens=out.int(),
        accept_prob=(probability / seen.sum(1).clamp_min(1)).float(),
        status=torch.zeros(batch, dtype=torch.int32, device=tokens.device),
    )


def _lenience(epsilon: float, kind: str) -> Callable[[Tensor], Tensor]:
    if not 0 < epsilon <= 1:
        raise ValueError(f"expected epsilon in (0, 1], got {epsilon}: 1 is lossless")
    if kind not in LENIENCE:
        raise ValueError(f"no lenience {kind!r}: expected one of {', '.join(LENIENCE)}")
    return lambda p: LENIENCE[kind](p, epsilon)


def _rows(
    tokens: Tensor, target: Tensor, draft: Tensor, temperature: float, is_prob: bool
) -> tuple[Tensor, Tensor]:
    """Both sides' probabilities, float64 [B, T, V]."""
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"expected tokens [B, T] with B, T >= 1, got {list(tokens.shape)}")
    for name, x in (("target", target), ("draft", draft)):
        if x.dim() != 3 or x.shape[:2] != tokens.shape:
            raise ValueError(f"expected {name} {list(tokens.shape)} x V, got {list(x.shape)}")
    if target.shape != draft.shape:
        raise ValueError(
            f"the target has {target.shape[-1]} columns, the draft model {draft.shape[-1]}: "
            "they need one vocabulary"
        )
    if tokens.min() < 0 or tokens.max() >= target.shape[-1]:
        raise ValueError(
            f"expected tokens in [0, {target.shape[-1]}), got {tokens.min()} to {tokens.max()}"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"expected a temperature > 0, got {temperature}: verify greedily at 0")
    if is_prob:
        _check_probabilities(target=target, draft=draft)
        return target.double(), draft.double()
    p, q = ((x.double() / temperature).softmax(-1) for x in (target, draft))
    _check_probabilities(target=p, draft=q)
    return p, q


def _check_probabilities(**rows: Tensor) -> None:
    for name, x in rows.items():
        off = (x.sum(-1) - 1).abs().max()
        if not off <= 1e-3 or x.min() < 0:
            raise ValueError(f"{name} has rows that are no probabilities: their sum is {off:g} off")
