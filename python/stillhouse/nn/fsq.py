"""Finite scalar quantization, at once and in stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.nn.projected_quantizer import ProjectedQuantizer
from stillhouse.ops.scalar_quantization import BOUNDS, FORMS, GRADIENTS, check_levels, one_of

__all__ = ["FSQ", "FiniteCodes", "ResidualFSQ"]


class FiniteCodes(NamedTuple):
    """What `FSQ` returns."""

    out: Tensor  # [..., D], of x's dtype
    codes: Tensor  # int64 [...], or [..., C] of more than one codebook


class FSQ(ProjectedQuantizer):
    """Finite scalar quantization (arXiv 2309.15505): see `ops.fsq` for the equations.

    Args:
        levels: L_i of each dimension; a codebook has prod L_i codes.
        dim: D, the width of what is quantized; d C if None. Linear layers lead to d C numbers and
            back where it is another.
        num_codebooks: C, so many groups of d numbers are quantized, each to a code of its own.
        form, bound: as in `ops.fsq`; "symmetric" where a dimension has 2 levels.
        seed: of the linear layers, drawn as `nn.Linear` draws them.

    `fsq(x, mask=None)` takes x [..., D] and mask bool [...] and returns `FiniteCodes`: rows that do
    not count have code -1 and zeros, rows that are not finite -1 and NaN.

    Raises ValueError and TypeError as `ops.fsq`, and ValueError for x of another width.

    Defaults: the paper's form. Its advice for sizes: [8, 6, 5] for 2^8, [8, 5, 5, 5] for 2^10,
    [7, 5, 5, 5, 5] for 2^12, [8, 8, 8, 5, 5, 5] for 2^16.

    Example:
        >>> import torch
        >>> from stillhouse.nn import FSQ
        >>> fsq = FSQ([8, 5, 5, 5], dim=32)
        >>> out, codes = fsq(torch.ones(2, 3, 32))
        >>> out.shape, codes.shape, fsq.codebook_size
        (torch.Size([2, 3, 32]), torch.Size([2, 3]), 1000)
        >>> torch.allclose(fsq.decode(codes), out)
        True
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        *,
        form: str = "offset",
        bound: str = "tanh",
        seed: int = 0,
    ):
        one_of("form", form, FORMS)
        one_of("bound", bound, BOUNDS)
        levels = check_levels(levels, form)
        if num_codebooks < 1:
            raise ValueError(f"num_codebooks must be 1 or more, got {num_codebooks}")
        super().__init__(dim, len(levels) * num_codebooks, seed)
        self.levels, self.num_codebooks = levels, num_codebooks
        self.form, self.bound = form, bound
        self.codebook_size = math.prod(levels)
        self._single = num_codebooks == 1
        self.register_buffer("_levels", torch.tensor(levels), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> FiniteCodes:
        inside, of_rows = self._inside(x, mask), mask
        if not self._single:
            inside = inside.unflatten(-1, (self.num_codebooks, -1))
            of_rows = None if mask is None else mask[..., None]
        found = ops.fsq(inside, self._levels, form=self.form, bound=self.bound, mask=of_rows)
        self._last = (found.codes,)
        out = found.out if self._single else found.out.flatten(-2)
        return FiniteCodes(self._outside(out, x, mask), found.codes)

    def encode(self, x: Tensor) -> Tensor:
        """Only the codes."""
        return self(x).codes

    def decode(self, codes: Tensor) -> Tensor:
        """[..., D] of codes as the call returns them; -1 is zeros before the projection."""
        if not self._single and (codes.dim() < 1 or codes.shape[-1] != self.num_codebooks):
            raise ValueError(f"codes must be [..., {self.num_codebooks}], got {tuple(codes.shape)}")
        found = ops.fsq_decode(codes, self._levels, form=self.form)
        return self._outside(found if self._single else found.flatten(-2), None)

    def extra_repr(self) -> str:
        return f"levels={list(self.levels)}, num_codebooks={self.num_codebooks}, form={self.form}"


class ResidualFSQ(ProjectedQuantizer):
    """Finite scalar quantization in stages: see `ops.residual_fsq` for the equations.

    Args:
        levels: L_i of each dimension, in every stage.
        num_quantizers: Q, the number of stages.
        dim: D, the width of what is quantized; len(levels) if None.
        quantizer_dropout: the share of items [T, D] that get a depth drawn from 1 to Q while
            training, each item by itself.
        grad: "ste" or "stage_sum", as in `ops.residual_fsq`.
        seed: of the linear layers and of the depths; those of a call depend on how many calls drew
            depths before, which is part of the state.

    `rfsq(x, mask=None, num_quantizers=None)` takes x [B, T, D] and mask bool [B, T];
    num_quantizers, an int or int64 [B] or [B, T], is used instead of drawn depths. It returns
    `ops.ResidualCodes`: out [B, T, D] of x's dtype, codes [B, T, Q] with -1 beyond a depth, error
    [B, T, Q] in the width of the levels.

    Raises ValueError and TypeError as `ops.residual_fsq`, and ValueError for x of another width and
    a share outside [0, 1].

    Defaults: no dropout; gradients of "ste" (ours: "stage_sum" grows with the number of stages).

    Example:
        >>> import torch
        >>> from stillhouse.nn import ResidualFSQ
        >>> rfsq = ResidualFSQ([8, 8, 8], 4, dim=16)
        >>> found = rfsq(torch.ones(2, 5, 16))
        >>> found.codes.shape
        torch.Size([2, 5, 4])
        >>> rfsq.decode(found.codes[..., :2]).shape
        torch.Size([2, 5, 16])
    """

    _single = False

    def __init__(
        self,
        levels: Sequence[int],
        num_quantizers: int,
        dim: int | None = None,
        *,
        quantizer_dropout: float = 0.0,
        grad: str = "ste",
        seed: int = 0,
    ):
        one_of("grad", grad, GRADIENTS)
        levels = check_levels(levels, "symmetric")
        if num_quantizers < 1:
            raise ValueError(f"num_quantizers must be 1 or more, got {num_quantizers}")
        if not 0 <= quantizer_dropout <= 1:
            raise ValueError(f"quantizer_dropout is a share, from 0 to 1, got {quantizer_dropout}")
        super().__init__(dim, len(levels), seed)
        self.levels, self.num_quantizers, self.grad = levels, num_quantizers, grad
        self.quantizer_dropout, self.seed = quantizer_dropout, seed
        self.codebook_size = math.prod(levels)
        self.register_buffer("_levels", torch.tensor(levels), persistent=False)
        if quantizer_dropout:
            self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        num_quantizers: int | Tensor | None = None,
    ) -> ops.ResidualCodes:
        inside = self._inside(x, mask)
        if num_quantizers is None and self.training and self.quantizer_dropout:
            num_quantizers = self._depths(len(x))
        if isinstance(num_quantizers, Tensor) and num_quantizers.dim() == 1:
            num_quantizers = num_quantizers.reshape(-1, *[1] * (x.dim() - 2))
        found = ops.residual_fsq(
            inside,
            self._levels,
            self.num_quantizers,
            grad=self.grad,
            num_quantizers=num_quantizers,
            mask=mask,
        )
        self._last = found.codes, inside.detach(), found.error.detach()
        return found._replace(out=self._outside(found.out, x, mask))

    def encode(self, x: Tensor, num_quantizers: int | Tensor | None = None) -> Tensor:
        """Only the codes, of all stages unless `num_quantizers` says otherwise."""
        stages = self.num_quantizers if num_quantizers is None else num_quantizers
        return self(x, num_quantizers=stages).codes

    def decode(self, codes: Tensor) -> Tensor:
        """[..., D] of codes [..., Q] or of the first of them; -1 adds nothing."""
        if codes.dim() < 1 or codes.shape[-1] > self.num_quantizers:
            raise ValueError(
                f"codes must be [..., {self.num_quantizers}] or fewer, got {tuple(codes.shape)}"
            )
        return self._outside(ops.residual_fsq_decode(codes, self._levels), None)

    def metrics(self) -> dict[str, Tensor]:
        """For each stage, [Q]: what `FSQ.metrics` has, and "snr_db", the signal-to-noise ratio in
        decibels after it, of the rows that reach it."""
        codes, inside, error = self._last_call()
        edge = 1 + 1 / (self._levels - 1)
        power = (torch.tanh(inside.double() / edge) * edge).square().sum(-1, keepdim=True)
        there = codes >= 0
        signal = torch.where(there, power, 0.0).flatten(0, -2).sum(0)
        noise = torch.where(there, error.double(), 0.0).flatten(0, -2).sum(0)
        return super().metrics() | {"snr_db": 10 * (signal / noise).log10()}

    def _depths(self, items: int) -> Tensor:
        """int64 [items], of a counter in integers: the same on every device, and compiled."""
        self.draws.add_(1)
        key = _mixed(self.draws + (self.seed * 1_000_003 & 0xFFFFFFFF))
        item = _mixed(key + torch.arange(items, device=key.device))
        depth = 1 + (_mixed(item) * self.num_quantizers >> 32)
        drawn = item < round(self.quantizer_dropout * 2**32)
        return torch.where(drawn, depth, self.num_quantizers)

    def extra_repr(self) -> str:
        return f"levels={list(self.levels)}, num_quantizers={self.num_quantizers}"


def _mixed(key: Tensor) -> Tensor:
    """32 bits of int64 keys, well mixed; no product leaves int64."""
    key = key & 0xFFFFFFFF
    for _ in range(2):
        key = (key >> 16 ^ key) * 0x45D9F3B & 0xFFFFFFFF
    return key >> 16 ^ key
