"""Quantization to signs, with the entropies that make all codes used."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stillhouse import ops
from stillhouse.nn.projected_quantizer import ProjectedQuantizer
from stillhouse.ops.bit_entropy import MOST as MOST_OF_A_GROUP
from stillhouse.ops.scalar_quantization import on_sphere

__all__ = ["LFQ", "LookupFree"]

MOST_BITS = 16  # of which the joint distribution is counted unless the module is told otherwise


class LookupFree(NamedTuple):
    """What `LFQ` returns."""

    out: Tensor  # [..., D], of x's dtype
    codes: Tensor  # int64 [...]
    loss: Tensor  # [], entropy_weight * entropy.loss + commitment_weight * commit_loss
    entropy: ops.CodeEntropy | None  # None where its weight is 0
    commit_loss: Tensor  # [], the mean of (x_i - q_i)^2, q fixed


class LFQ(ProjectedQuantizer):
    """Lookup-free quantization to signs (arXiv 2310.05737), or with `spherical` binary spherical
    quantization (arXiv 2406.07548): see `ops.lfq`, `ops.bsq` and `ops.lfq_entropy`.

    Args:
        bits: d; there are 2^d codes.
        dim: D, the width of what is quantized; d if None.
        entropy_weight, commitment_weight: of the parts of the loss.
        diversity: gamma, what the entropy of the mean distribution counts.
        inv_temperature: beta of the soft codes.
        entropy_group: bits whose joint distribution is counted, as `group` of `ops.lfq_entropy`;
            None is all of them up to 16 bits, exact, and beyond that 1, bit by bit, which the
            module's `entropy_group` and its repr say.
        spherical: quantize x / |x|.
        sync: while training, the mean distribution is that of the rows of all processes of
            torch.distributed, if it is initialised; they all have to call.
        seed: of the linear layers.

    `lfq(x, mask=None)` takes x [..., D] and mask bool [...] and returns `LookupFree`, in evaluation
    too; `encode` spares the losses. They are means over the rows that count.

    Raises ValueError for bits outside 1 to 63, a group that there is not, weights below 0, x of
    another width.

    Defaults: those of vector-quantize-pytorch, entropy 0.1, gamma 1, commitment 0, beta 100. (The
    code of BSQ's authors has beta 1 and groups of 9 bits.) With a mask, that package's mean
    distribution is each row's own; here it is that of the rows that count.

    Example:
        >>> import torch
        >>> from stillhouse.nn import LFQ
        >>> lfq = LFQ(12, dim=32)
        >>> found = lfq(torch.ones(2, 3, 32))
        >>> found.codes.shape, lfq.decode(found.codes).shape
        (torch.Size([2, 3]), torch.Size([2, 3, 32]))
        >>> found.loss.backward()
    """

    _single = True

    def __init__(
        self,
        bits: int,
        dim: int | None = None,
        *,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        commitment_weight: float = 0.0,
        inv_temperature: float = 100.0,
        entropy_group: int | None = None,
        spherical: bool = False,
        sync: bool = True,
        seed: int = 0,
    ):
        if not 1 <= bits <= 63:
            raise ValueError(f"a code has from 1 to 63 bits, got {bits}")
        if entropy_weight < 0 or commitment_weight < 0 or diversity < 0 or inv_temperature <= 0:
            raise ValueError(
                "weights must be 0 or more and inv_temperature positive, got entropy_weight "
                f"{entropy_weight}, diversity {diversity}, commitment_weight {commitment_weight}, "
                f"inv_temperature {inv_temperature}"
            )
        if entropy_group is None:
            entropy_group = bits if bits <= MOST_BITS else 1
        if not 1 <= entropy_group <= min(bits, MOST_OF_A_GROUP):
            raise ValueError(
                f"entropy_group must be from 1 to {min(bits, MOST_OF_A_GROUP)} bits, got "
                f"{entropy_group}"
            )
        super().__init__(dim, bits, seed)
        self.bits, self.codebook_size, self.spherical = bits, 2**bits, spherical
        self.entropy_weight, self.commitment_weight = entropy_weight, commitment_weight
        self.diversity, self.inv_temperature = diversity, inv_temperature
        self.entropy_group, self.sync = entropy_group, sync

    def forward(self, x: Tensor, mask: Tensor | None = None) -> LookupFree:
        inside = self._inside(x, mask)
        found = (ops.bsq if self.spherical else ops.lfq)(inside, mask=mask)
        self._last = (found.codes,)
        commit_loss = self._commitment(inside, found.out.detach(), mask)
        loss, entropy = self.commitment_weight * commit_loss, None
        if self.entropy_weight:
            entropy = (ops.bsq_entropy if self.spherical else ops.lfq_entropy)(
                inside,
                diversity=self.diversity,
                inv_temperature=self.inv_temperature,
                group=self.entropy_group,
                mask=mask,
                process_group=self._process_group(),
            )
            loss = loss + self.entropy_weight * entropy.loss
        out = self._outside(found.out, x, mask)
        return LookupFree(out, found.codes, loss, entropy, commit_loss)

    def encode(self, x: Tensor) -> Tensor:
        """Only the codes."""
        return ops.lfq(self._inside(x, None)).codes

    def decode(self, codes: Tensor) -> Tensor:
        """[..., D] of codes [...]; -1 is zeros before the projection."""
        decode = ops.bsq_decode if self.spherical else ops.lfq_decode
        return self._outside(decode(codes, self.bits), None)

    def _process_group(self) -> dist.ProcessGroup | None:
        if self.sync and self.training and dist.is_available() and dist.is_initialized():
            return dist.group.WORLD
        return None

    def _commitment(self, inside: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        wide = inside.to(value.dtype)
        wide = on_sphere(wide) if self.spherical else wide
        distance = (wide - value).square().mean(-1)
        if mask is None:
            return distance.sum() / max(distance.numel(), 1)
        return torch.where(mask, distance, 0.0).sum() / mask.sum().clamp(min=1)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, entropy_group={self.entropy_group}, spherical={self.spherical}"
