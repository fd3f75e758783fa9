"""Mixtures small enough to follow by hand."""

import pytest
import torch
from torch import nn


class Gated(nn.Module):
    """A gated feed-forward layer."""

    def __init__(self, width=6, inner=10):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner)
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.fixture
def gated():
    """gated(width=6, inner=10): a gated feed-forward layer in float64."""
    return lambda *sizes: Gated(*sizes).double()


@pytest.fixture
def steered():
    """steered(experts, router, **options): a mixture of D = E whose logits are its inputs, and
    whose expert e multiplies by e + 1."""
    from stillhouse.nn.moe import MoE

    class Times(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

        def forward(self, x):
            return self.factor * x

    def make(experts, router, **options):
        factors = [Times(float(e + 1)) for e in range(experts)]
        moe = MoE(factors, router, width=experts - options.get("shared", 0), **options)
        if getattr(moe.router, "weight", None) is not None:
            with torch.no_grad():
                moe.router.weight.copy_(torch.eye(*moe.router.weight.shape))
        return moe

    return make
