"""Entropies of codes of independent bits, exact without a table of rows by codes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import softplus

from .rows import check_floats, mask_of_rows
from .scalar_quantization import on_sphere

MOST = 20  # bits of a group
FAR = 1e3  # log-odds beyond which an entropy is 0 in float64, too


class CodeEntropy(NamedTuple):
    """What `lfq_entropy` and `bsq_entropy` return, in nats."""

    loss: Tensor  # [], row - diversity * mean
    row: Tensor  # [], E[H(p)], the mean entropy of a row's code
    mean: Tensor  # [], H(E[p]), the entropy of the rows' mean distribution


def lfq_entropy(
    x: Tensor,
    *,
    diversity: float | Tensor = 1.0,
    inv_temperature: float | Tensor = 100.0,
    group: int | None = None,
    mask: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> CodeEntropy:
    """E[H(p)] - gamma H(E[p]) of soft codes p(c) ~ exp(-beta |x - c|^2), c in {-1, 1}^d: small
    where rows are sure of their code and all codes are used (arXiv 2310.05737).

    p is a product over bits, whose log-odds are 4 beta x_i: H(p) is the sum of the bits' entropies.
    A mean of products is none. But it is A^T B / N, where A and B [N, 2^(d/2)] are each row's
    probabilities of the first half of the bits and of the rest: exact, with 2^d numbers in all and
    2^(d/2) a row, never 2^d a row.

    Args:
        x: rows [..., d] before their signs are taken.
        diversity: gamma, a number or a tensor [].
        inv_temperature: beta, likewise; as tensors they can change without a new compilation.
        group: bits whose joint distribution is counted, the last group may have fewer; H(E[p]) is
            then the sum of the groups' entropies, an upper bound: equal where groups are
            independent. 1 is bit by bit; None is all bits, exact, at most 20.
        mask: bool [...]; False = the row does not count, and what is in it does not matter.
        process_group: of torch.distributed; E[p] is then the mean over the rows of all its
            processes, which all have to call. `row` stays this process's. Gradients are those of
            the whole where a wrapper takes their mean over processes, as DDP does.

    Of no rows all is 0; a row that counts and is not finite makes NaN.

    Raises:
        ValueError: a group outside 1 to 20, more than 20 bits without one, a mask of another shape,
            inv_temperature <= 0, a diversity < 0.
        TypeError: x that is not of floats, a mask that is not bool.

    Defaults: gamma 1 and beta 100 (vector-quantize-pytorch, which clamps probabilities to 1e-5
    before it takes logarithms; here they are exact).

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> ops.lfq_entropy(x).mean.exp()  # four codes, each sure
        tensor(4.)
    """
    return _entropy(x, 4 * inv_temperature, diversity, inv_temperature, group, mask, process_group)


def bsq_entropy(
    x: Tensor,
    *,
    diversity: float | Tensor = 1.0,
    inv_temperature: float | Tensor = 100.0,
    group: int | None = None,
    mask: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> CodeEntropy:
    """`lfq_entropy` on the unit sphere: codes {-1, 1}^d / sqrt d and u = x / |x|, so that log-odds
    are 4 beta u_i / sqrt d (arXiv 2406.07548, whose tau is 2 beta). Arguments and errors as there.

    Defaults: beta 100 (vector-quantize-pytorch), and all bits in one group. The authors' code has
    beta 1 and groups of 9 bits; the paper's own approximation is group=1.
    """
    factor = 4 * inv_temperature / math.sqrt(max(x.shape[-1], 1)) if x.dim() else 1.0
    return _entropy(x, factor, diversity, inv_temperature, group, mask, process_group, sphere=True)


def _entropy(
    x, factor, diversity, inv_temperature, group, mask, process_group, sphere=False
) -> CodeEntropy:
    check_floats(x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be [..., d] with a bit or more, got {tuple(x.shape)}")
    if not isinstance(inv_temperature, Tensor) and not 0 < inv_temperature < math.inf:
        raise ValueError(f"inv_temperature must be positive, got {inv_temperature}")
    if not isinstance(diversity, Tensor) and not 0 <= diversity < math.inf:
        raise ValueError(f"diversity must be 0 or more, got {diversity}")
    bits = x.shape[-1]
    if group is None and bits > MOST:
        raise ValueError(
            f"the joint distribution of {bits} bits has 2^{bits} numbers: pass group=, from 1 to "
            f"{MOST}, for the sum over groups of so many bits"
        )
    group = bits if group is None else group
    if not 1 <= group <= MOST:
        raise ValueError(f"group must be from 1 to {MOST} bits, got {group}")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weight = torch.ones_like(wide[..., 0])
    if mask is not None:
        mask = mask_of_rows(mask, x)
        wide, weight = torch.where(mask[..., None], wide, 0.0), mask.to(wide.dtype)
    wide, weight = wide.reshape(-1, bits), weight.reshape(-1)
    count = weight.sum()
    weight = torch.where(wide.isfinite().all(-1), weight, torch.nan) / count.clamp(min=1)
    if sphere:
        wide = on_sphere(wide)
    odds = (factor * wide).clamp(-FAR, FAR)
    far = odds.abs()
    of_bits = softplus(-far) + far * torch.sigmoid(-far)  # no difference of large numbers
    row = (weight[:, None] * of_bits).sum()
    if process_group is not None:
        share = count / _Summed.apply(count, process_group).clamp(min=1)
        mean = _entropy_of_mean(odds, share * weight, min(group, bits), process_group)
    else:
        mean = _entropy_of_mean(odds, weight, min(group, bits))
    return CodeEntropy(row - diversity * mean, row, mean)


class _Summed(torch.autograd.Function):
    """A sum over processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = own.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        total = upstream.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _entropy_of_mean(
    odds: Tensor, weight: Tensor, group: int, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Of log-odds [N, d] and weights [N], the sum over groups of H(sum_n w_n p_n)."""
    whole = odds.shape[1] // group * group
    total = odds.new_zeros(())
    for part, size in ((odds[:, :whole], group), (odds[:, whole:], odds.shape[1] - whole)):
        if not size:
            continue
        split = part.reshape(len(part), part.shape[1] // size, size).transpose(0, 1)
        first, last = split[..., : (size + 1) // 2], split[..., (size + 1) // 2 :]
        with torch.autocast(odds.device.type, enabled=False):
            mean = (_joint(first) * weight[:, None]).mT @ _joint(last)
        if process_group is not None:
            mean = _Summed.apply(mean, process_group)
        # Where a probability is 0 its logarithm's slope has to be finite.
        tiny = torch.finfo(mean.dtype).tiny
        total = total - (mean * mean.clamp(min=tiny).log()).sum()
    return total


def _joint(odds: Tensor) -> Tensor:
    """Probabilities [..., 2^k] of all settings of k bits, the first bit counting most."""
    joint = odds.new_ones(*odds.shape[:-1], 1)
    for bit in odds.unbind(-1):
        pair = torch.stack([torch.sigmoid(-bit), torch.sigmoid(bit)], -1)
        joint = (joint[..., :, None] * pair[..., None, :]).flatten(-2)
    return joint
