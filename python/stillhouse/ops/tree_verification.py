"""Verification of draft trees: which of their tokens the target accepts, and what comes behind."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import tree_registered
from .divergence_arguments import DTYPES
from .random import in_int64
from .tree import TreeLinks, check_nodes
from .tree_reference import (
    BEHIND_DETERMINISTIC,
    DETERMINISTIC,
    MODES,
    NO_SUCH_TOKEN,
    NOT_FINITE,
    NOT_NORMALIZED,
)

_PROPOSED = ("multi_round", "traversal")  # modes that compare with the proposal
_NUMBERS = {mode: number for number, mode in enumerate(MODES)}
BROKEN = {
    NOT_FINITE: "a row has NaN or +inf, or nothing above -inf",
    NOT_NORMALIZED: "a row of probabilities is negative somewhere, or does not sum to 1",
    NO_SUCH_TOKEN: "a node's token is outside of the vocabulary",
}


class VerifyOut(NamedTuple):
    """What `tree_verify` has accepted; D = min(T - 1, 64)."""

    n_accepted: Tensor  # int32 [B], draft tokens; the root does not count
    path: Tensor  # int32 [B, D + 1], accepted nodes, the root first, then -1
    out_tokens: Tensor  # int32 [B, D + 1], accepted tokens and the final one, then -1
    accept_prob: Tensor  # float32 [B], of the last accepted node when its turn came; 1 if none
    status: Tensor  # int32 [B], bits that `tree_verify` explains


def tree_verify(
    tokens: Tensor,
    links: TreeLinks,
    target: Tensor,
    draft: Tensor | None = None,
    *,
    mode: str = "auto",
    kind: Tensor | None = None,
    temperature: float | Tensor | None = None,
    seed: int | Tensor | None = None,
    position: int | Tensor = 0,
    is_prob: bool = False,
    check: bool = False,
    coins: Tensor | None = None,
    epsilon: float = 0.09,
    delta: float = 0.3,
) -> VerifyOut:
    """Which path of each draft tree is accepted, and the token behind it.

    The tokens that come out follow the target's law, whatever was drafted, as long as each child
    was proposed as its kind says ("typical" alone does not keep the law).

    Args:
        tokens: int32 [B, T]; the root's is not read.
        links: of the trees, from `tree_build`.
        target: [B, T, V], float32, bfloat16, float16 or float64: the target's logits behind each
            node, top-k and top-p already applied as -inf.
        draft: [B, T, V], any of these dtypes: logits of the proposal that a node's children were drawn from: the very
            ones, after the drafter's own temperature times `temperature`. None: all tokens are
            deterministic. Read by "multi_round" and "traversal" alone.
        mode: "greedy": the target's argmax. "target": a token is sampled from the target, and
            accepted while the tree has it. "multi_round": children are accepted or rejected in
            order, top-down (SpecInfer, arXiv 2305.09781; without replacement as in Sequoia,
            arXiv 2402.12374). "traversal": from the leaves up (arXiv 2505.12398), on chains block
            verification (arXiv 2403.10444); it accepts the most. "typical": Medusa's threshold
            (arXiv 2401.10774, section 3.2), LOSSY. "auto": "greedy" at temperature 0, else
            "target" without a draft, else "traversal".
        kind: uint8 [B, T], how each node was proposed: 0 sampled without replacement, 1 drawn
            independently, 2 deterministic, 3 sampled without replacement from the proposal without
            the tokens of its deterministic siblings, which come behind it. The sampled children of
            one node are of one kind. None: all 0 with a draft, all 2 without.
        temperature: divides both logits, a number or [B]; None is 1. 0 is for "auto", or "greedy",
            which reads none. Probabilities have none.
        seed: an int or int64 [B]; every random number is `philox_uniform(seed, position, node,
            stream)`, stream 0 for acceptance and 1 for the final token: the same on any device, in
            any batch and with any padding.
        position: an int or int64 [B], of the round in its sequence; no two rounds of a sequence
            may share one.
        is_prob: target and draft are probabilities.
        check: raise for what `status` says, which waits for the device.
        coins: float64 [B, T, 2] in place of random numbers, by node and stream.
        epsilon, delta: of "typical": a child is accepted if p > min(epsilon, delta exp(-H(p))).

    Returns:
        VerifyOut. Bits of status: 1 a row has NaN or +inf, or nothing above -inf; 2 probabilities
        do not sum to 1 within 1e-3, or are negative; 4 a token outside of the vocabulary; all of
        rows and nodes that were looked at, and the walk stops there: the final token is -1. 8: a
        residual was too small to sample from (1e-7) and stayed what it was.

    Raises:
        ValueError: shapes, devices or numbers that do not fit, no seed where one is needed,
            sampled kinds without a draft, temperatures of a tensor (those two on the CPU, elsewhere
            with check=True), and what `check` finds.
        TypeError: a dtype outside the lists above.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> links = ops.tree_build(torch.tensor([[-1, 0, 0]], dtype=torch.int32))
        >>> tokens = torch.tensor([[7, 2, 1]], dtype=torch.int32)
        >>> target = torch.tensor([[[0.1, 3.0, 0.2], [0.0, 1.0, 0.0], [2.0, 0.0, 0.0]]])
        >>> out = ops.tree_verify(tokens, links, target, temperature=0)
        >>> out.path.tolist(), out.out_tokens.tolist()
        ([[0, 2, -1]], [[1, 0, -1]])
    """
    _check_tensors(tokens, links, target, draft, kind, coins)
    mode = _mode(mode, temperature, draft)
    proposed = mode in _PROPOSED
    if not (proposed and draft is not None):
        _check_deterministic(kind if proposed else None, links, check)
        draft = kind = None
    temperature = _temperature(temperature, mode, is_prob, check, target)
    if seed is None:
        if mode != "greedy" and coins is None:
            raise ValueError(f'mode "{mode}" draws: it needs a seed')
        seed = 0
    if mode == "typical" and not (epsilon >= 0 and delta >= 0):
        raise ValueError(f"epsilon and delta must be at least 0, got {epsilon} and {delta}")
    found = tree_registered.verify(
        target.contiguous(),
        tokens.contiguous(),
        links.parents,
        links.first_child,
        links.next_sibling,
        None if draft is None else draft.contiguous(),
        None if kind is None else kind.contiguous(),
        temperature,
        _places("seed", seed, target),
        _places("position", position, target),
        None if coins is None else coins.contiguous(),
        _NUMBERS[mode],
        is_prob,
        epsilon,
        delta,
    )
    out = VerifyOut(*found)
    if check:
        _check_content(out.status, kind)
    return out


def _check_tensors(tokens, links, target, draft, kind, coins) -> None:
    """Dtypes, shapes and devices."""
    check_nodes("tokens", tokens, torch.int32)
    if not isinstance(links, TreeLinks):
        raise TypeError(f"links must be TreeLinks of tree_build, got {type(links).__name__}")
    shape, device = links.parents.shape, links.parents.device
    if tokens.shape != shape or tokens.device != device:
        raise ValueError(
            f"tokens must be {tuple(shape)} on {device} as the links are, got "
            f"{tuple(tokens.shape)} on {tokens.device}"
        )
    for name, rows in ("target", target), ("draft", draft):
        if rows is None and name == "draft":
            continue
        if not isinstance(rows, Tensor) or rows.dtype not in DTYPES:
            found = getattr(rows, "dtype", type(rows))
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {found}")
        if rows.dim() != 3 or rows.shape[:2] != shape or rows.shape[2] == 0:
            raise ValueError(f"{name} must be {[*shape, 'V']}, got {tuple(rows.shape)}")
        if rows.device != device:
            raise ValueError(f"{name} is on {rows.device}, links on {device}")
    if draft is not None and draft.shape != target.shape:
        raise ValueError(
            f"target has {target.shape[2]} columns and draft {draft.shape[2]}: they need one "
            "vocabulary"
        )
    for name, part, dtype, wanted in (
        ("kind", kind, torch.uint8, shape),
        ("coins", coins, torch.float64, (*shape, 2)),
    ):
        if part is None:
            continue
        check_nodes(name, part, dtype)
        if part.shape != wanted or part.device != device:
            raise ValueError(
                f"{name} must be {tuple(wanted)} on {device}, got {tuple(part.shape)} on "
                f"{part.device}"
            )


def _mode(mode: str, temperature, draft: Tensor | None) -> str:
    if mode == "auto":
        if not isinstance(temperature, Tensor) and temperature == 0:
            return "greedy"
        return "target" if draft is None else "traversal"
    if mode not in _NUMBERS:
        raise ValueError(f"mode must be auto or one of {', '.join(MODES)}, got {mode!r}")
    return mode


def _reads(x: Tensor, check: bool) -> bool:
    """Whether numbers in it are looked at before the kernel."""
    return (check or x.is_cpu) and not torch.compiler.is_compiling()


def _check_deterministic(kind: Tensor | None, links: TreeLinks, check: bool) -> None:
    """Without a proposal."""
    if kind is None or not _reads(kind, check):
        return
    if bool(((kind != DETERMINISTIC) & (links.parents >= 0)).any()):
        raise ValueError(
            "sampled nodes (kind 0, 1 or 3) need draft, the proposal that they were drawn from"
        )


def _temperature(temperature, mode, is_prob, check, target) -> Tensor | None:
    """float64 [B], or None."""
    if mode == "greedy" or temperature is None:
        return None
    batch = len(target)
    if isinstance(temperature, Tensor):
        if temperature.shape != (batch,) or temperature.device != target.device:
            raise ValueError(
                f"temperature must be a number or [{batch}] on {target.device}, got "
                f"{tuple(temperature.shape)} on {temperature.device}"
            )
        if is_prob:
            raise ValueError("probabilities have no temperature: leave it, or give logits")
        temperature = temperature.double()
        if _reads(temperature, check):
            fits = (temperature > 0) & (temperature < math.inf)
            if not bool(fits.all()):
                raise ValueError(
                    f"temperature must be above 0 and finite, got {temperature[~fits]}"
                )
        return temperature.contiguous()
    if not 0 < temperature < math.inf:
        raise ValueError(f'mode "{mode}" needs a temperature above 0 and finite, got {temperature}')
    if temperature == 1:
        return None
    if is_prob:
        raise ValueError(f"probabilities have no temperature, got {temperature}")
    return torch.full((batch,), temperature, dtype=torch.float64, device=target.device)


def _places(name: str, given: int | Tensor, target: Tensor) -> Tensor:
    """int64 [B]."""
    batch = len(target)
    if not isinstance(given, Tensor):
        if isinstance(given, float):
            raise TypeError(f"{name} must be an int or int64 [{batch}], got {given}")
        return torch.full((batch,), in_int64(given), dtype=torch.int64, device=target.device)
    if given.dtype != torch.int64:
        raise TypeError(f"{name} must be an int or int64, got {given.dtype}")
    if given.shape != (batch,) or given.device != target.device:
        raise ValueError(
            f"{name} must be an int or [{batch}] on {target.device}, got {tuple(given.shape)} on "
            f"{given.device}"
        )
    return given.contiguous()


def _check_content(status: Tensor, kind: Tensor | None) -> None:
    """Raises for the first tree that could not be verified."""
    if kind is not None and bool((kind > BEHIND_DETERMINISTIC).any()):
        raise ValueError(f"kind must be 0 to {BEHIND_DETERMINISTIC}, got {int(kind.max())}")
    for row, bits in enumerate(status.tolist()):
        for bit, words in BROKEN.items():
            if bits & bit:
                raise ValueError(f"tree {row} could not be verified: {words}")
