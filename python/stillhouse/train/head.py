"""A model's output head, and what the model makes of the logits that come out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """Logits are cap tanh(scale x / cap) with x = `forward(hidden)`; no cap: scale x.

    `forward` is the module's own, whatever stands in its place meanwhile.
    """

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    scale: float = 1.0
    softcap: float | None = None

    def linear(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias where `forward` is their product with the hidden states, and nothing else
        (an adapter, a quantised or sharded weight); else None."""
        module = self.module
        plain = getattr(self.forward, "__func__", None) is nn.Linear.forward
        if not plain or type(module.weight) not in (Tensor, nn.Parameter):
            return None
        return module.weight, module.bias

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits of these hidden states."""
        x = self.scale * self.forward(hidden) if self.scale != 1 else self.forward(hidden)
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


# What goes through the model in the head's place, over and over up to a row's columns, to see what
# comes out: small, usual, and large.
PROBE = (2.0**-10, -0.5, 1.0, -3.0, 10.0, 40.0, 2.0**20)


def transform_of(probe: Tensor, seen: Tensor) -> tuple[float, float | None] | None:
    """(scale, cap) that make `seen` of `probe`; None where no such pair does."""
    if seen.shape != probe.shape or seen.dtype != probe.dtype or not seen.isfinite().all():
        return None
    probe, seen = probe.double(), seen.double()
    scale = _plain((seen.flatten()[0] / probe.flatten()[0]).item())

    def fits(made: Tensor) -> bool:
        return torch.allclose(made, seen, rtol=1e-5, atol=0)

    if fits(scale * probe):
        return scale, None
    cap = _plain(seen.abs().max().item())
    return (scale, cap) if cap > 0 and fits(cap * torch.tanh(scale * probe / cap)) else None


def _plain(x: float) -> float:
    """Without the rounding of float32, if it is that of a shorter number."""
    short = float(f"{x:.6g}")
    return short if abs(short - x) <= 2e-7 * abs(x) else x
