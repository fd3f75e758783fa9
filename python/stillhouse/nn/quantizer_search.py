"""From what a residual quantizer is given to rows of its tables' space, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from stillhouse import ops
from stillhouse.nn.quantizer_state import QuantizerState
from stillhouse.ops import divergence_autograd, rvq_autograd
from stillhouse.ops.rows import check_depth


class Quantized(NamedTuple):
    """What a quantizer returns; `GroupedResidualVQ` has G before the shapes of the last two."""

    out: Tensor  # [..., D], in x's dtype; 0 where the mask says no
    codes: Tensor  # int64 [..., Q], -1 = none
    commit_loss: Tensor  # [Q], float32


class _Plan(NamedTuple):
    """What the search reads of a checked call (`rvq_autograd.encode`)."""

    x: Tensor
    tables: Tensor
    packed: Tensor
    stages: int
    metric: str
    depth: None = None
    sizes: None = None


class QuantizerSearch(QuantizerState):
    """Rows [G, N, d] of x [..., D] and what is found of them; nothing is learnt here."""

    def _search(self, rows: Tensor, tables: Tensor, packed: Tensor | None, mask, depth):
        """codes, out and error, [G, N, ...], with gradients, of a mask and depths [N]."""
        words = {"grad": self.grad, "metric": self.metric, "packed": packed}
        words |= {"num_quantizers": depth, "mask": mask}
        tables = self._scaled(tables)
        if self.projection == "per_stage":
            into = self.into_weight, self.into_bias
            out_of = self.out_of_weight, self.out_of_bias
            found = ops.projected_rvq(rows.squeeze(0), tables.squeeze(0), into, out_of, **words)
            found = [each[None] for each in found]
        else:
            found = ops.rvq(rows, self._stages(tables), **words)
        return found[1], found[0], found[2]

    def _found(self, rows: Tensor, stages: int | None, want_out: bool):
        """codes, out and error of all rows, without gradients and what they need."""
        self._check_stages(stages)
        stages, packed = stages or self.num_quantizers, self.packed()
        if self.projection == "per_stage":
            return self._search(rows, self.tables, packed, None, stages)
        if packed is None:
            packed = ops.rvq_pack(self.tables, metric=self.metric)
        plan = _Plan(rows, self.tables, packed, stages, self.metric)
        return rvq_autograd.encode(plan, want_out=want_out)[:3]

    def _result(self, shape, dtype, mask, codes: Tensor, out: Tensor, error: Tensor) -> Quantized:
        """Of what was found of rows [G, N, ...] what is returned of x; mask [N]."""
        if self.projection == "per_stage":
            out = out.view(shape)
        else:
            out = self._back(out, shape)
            if mask is not None and self.projection == "shared":
                out = out.masked_fill(~mask.view(*shape[:-1], 1), 0)
        count = max(error.shape[1], 1)
        if mask is not None:
            count = mask.sum().clamp(min=1)
        loss = error.sum(1) * (self.commitment_weight / (count * self.codebook_dim))
        codes = codes.view(self.groups, *shape[:-1], codes.shape[-1])
        out = out if out.dtype == dtype else out.to(dtype)
        return Quantized(out, self._ungrouped(codes), self._ungrouped(loss))

    def _frames(self, x: Tensor, stages: int | None) -> Quantized:
        """Nothing but the search: frames of a stream come one by one, and what is done around the
        kernel, whose tables have just emptied the caches, costs as much as a tenth of it."""
        kept, shape = self._cached, x.shape
        if (
            not torch.compiler.is_compiling()
            and self.plain
            and kept is not None
            and kept[0]._version == kept[1]
            and kept[0] is self._buffers.get("tables")
            and kept[2].dim() == 5  # there is a kernel
            and x.dtype is kept[0].dtype
            and x.device == kept[0].device
            and shape[-1] == self.dim
            and (stages is None or 1 <= stages <= self.num_quantizers)
        ):
            rows = x if len(shape) == 3 and shape[0] == 1 else x.reshape(1, -1, self.dim)
            words = kept[0], kept[2], None, None, stages or self.num_quantizers, True, True, False
            codes, out, error, _ = divergence_autograd.kernels().rvq_encode(rows, *words)
            if error.shape[1] == 1 and out.shape == shape:
                factor = self.commitment_weight / self.codebook_dim
                return Quantized(out, codes, error.view(-1).mul_(factor))
        else:
            codes, out, error = self._found(self._rows(x), stages, want_out=True)
        return self._result(x.shape, x.dtype, None, codes, out, error)

    def _rows(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[G, N, d] in the tables' space; with projections of each stage [1, N, D]. mask [N]."""
        if x.dim() < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be [..., {self.dim}], got {tuple(x.shape)}")
        if not x.is_floating_point() or (x.dtype is torch.float64) != (
            self.tables.dtype is torch.float64
        ):
            raise TypeError(f"x is {x.dtype} and the tables are {self.tables.dtype}")
        rows = x.reshape(1, -1, self.dim)
        if mask is not None and self.projection == "shared":
            # NaN times a gradient of 0 would reach the weights.
            rows = torch.where(mask[:, None], rows, 0)
        if self.grouped:
            rows = rows.view(-1, self.groups, self.dim // self.groups).transpose(0, 1)
        return _map(rows, self.into_weight, self.into_bias) if self.projection == "shared" else rows

    def _back(self, out: Tensor, shape) -> Tensor:
        """[..., D] of sums of codes [G, N, d]."""
        if self.projection == "shared":
            out = _map(out, self.out_of_weight, self.out_of_bias)
        return (out.transpose(0, 1).reshape(shape)) if self.grouped else out.view(shape)

    def _mapped(self, z: Tensor, codes: Tensor, shape) -> Tensor:
        """[..., D], the sum of what n stages make of their codes [n, N, d] by maps of their own."""
        weight = self.out_of_weight[: len(z)].transpose(0, 1).flatten(1)
        out = z.transpose(0, 1).flatten(1) @ weight.T
        if self.out_of_bias is not None:
            out = out + (codes[..., 0].T >= 0).to(out.dtype) @ self.out_of_bias[: len(z)]
        return out.view(shape)

    def _stages(self, tables: Tensor) -> Tensor:
        """[G, Q, K, d], the same one where stages share it."""
        return tables.expand(-1, self.num_quantizers, -1, -1)

    def _scaled(self, tables: Tensor) -> Tensor:
        """The tables, whose gradient of commit_loss is to have a weight of its own."""
        if self.update == "ema" or self.codebook_weight == self.commitment_weight:
            return tables
        return _ScaledGradient.apply(tables, self.codebook_weight / self.commitment_weight)

    def _checked(self, leading: torch.Size, mask: Tensor | None, depth: int | Tensor | None):
        """mask and depth as [N], of items or rows."""
        self._check_stages(depth)
        if isinstance(depth, Tensor):
            depth = self._of_rows("num_quantizers", depth, leading)
            check_depth(depth, self.num_quantizers)
        return self._of_rows("mask", mask, leading), depth

    def _check_stages(self, given: int | Tensor | None) -> None:
        if isinstance(given, int) and not 1 <= given <= self.num_quantizers:
            raise ValueError(
                f"num_quantizers must be from 1 to {self.num_quantizers}, the number of codebooks, "
                f"got {given}"
            )

    def _of_rows(self, name: str, given: Tensor | None, leading) -> Tensor | None:
        """[N] of what is given for items or rows."""
        if given is None:
            return None
        if name == "mask" and given.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {given.dtype}")
        if given.shape != leading[: given.dim()]:
            raise ValueError(
                f"{name} must be of items or rows {tuple(leading)}, got {tuple(given.shape)}"
            )
        right = [1] * (len(leading) - given.dim())
        return given.reshape(*given.shape, *right).expand(leading).flatten()


class _ScaledGradient(torch.autograd.Function):
    """The identity, with a factor on its gradient."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d_out):
        return d_out * ctx.factor, None


def _map(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Rows [G, N, a] by weights [G, b, a], in the weights' precision under autocast, too."""
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.to(weight.dtype)
        if len(weight) == 1:
            return linear(rows, weight[0], None if bias is None else bias[0])
        mapped = rows @ weight.mT
        return mapped if bias is None else mapped + bias[:, None]
