"""The layers of SEANet: convolutions that pad themselves, a residual unit, an LSTM with a skip."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, pad
from torch.nn.utils.parametrizations import weight_norm


class PaddedConv(nn.Module):
    """A weight-normed convolution [B, C, L] -> [B, out, ceil(L / stride)].

    What it lacks on the sides is reflected ("constant": zeros), in equal parts or, if causal, on
    the left alone; a last window that is not full gets the rest on its right.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        causal: bool = False,
        padding: str = "reflect",
    ):
        super().__init__()
        self.conv = weight_norm(nn.Conv1d(channels, out, kernel, stride, dilation=dilation))
        self.stride, self.causal, self.padding = stride, causal, padding
        self.missing = (kernel - 1) * dilation + 1 - stride

    def forward(self, x: Tensor) -> Tensor:
        rest = -x.shape[-1] % self.stride
        right = 0 if self.causal else self.missing // 2
        return self.conv(self._padded(x, self.missing - right, right + rest))

    def _padded(self, x: Tensor, left: int, right: int) -> Tensor:
        if self.padding != "reflect":
            return pad(x, (left, right))
        # A reflection must be shorter than what is reflected: what is too short gets zeros for it,
        # and they are cut off again.
        short = max(max(left, right) + 1 - x.shape[-1], 0)
        padded = pad(pad(x, (0, short)), (left, right), "reflect")
        return padded[..., : padded.shape[-1] - short]


class PaddedTransposed(nn.Module):
    """A weight-normed transposed convolution [B, C, L] -> [B, out, L stride] of twice the stride's
    width; what it has too much is cut off on both sides or, if causal, on the right."""

    def __init__(self, channels: int, out: int, stride: int, *, causal: bool = False):
        super().__init__()
        self.conv = weight_norm(nn.ConvTranspose1d(channels, out, 2 * stride, stride))
        self.left = 0 if causal else stride - stride // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[..., self.left : self.left + x.shape[-1] * self.stride]


class ResidualUnit(nn.Module):
    """ELU, convolution, ELU, convolution of width 1, with a bottleneck; beside it a convolution of
    width 1."""

    def __init__(self, channels: int, kernel: int, dilation: int, compress: int, **options):
        super().__init__()
        inner = channels // compress
        self.wide = PaddedConv(channels, inner, kernel, dilation=dilation, **options)
        self.narrow = PaddedConv(inner, channels, 1, **options)
        self.shortcut = PaddedConv(channels, channels, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.narrow(elu(self.wide(elu(x))))


class SkipLSTM(nn.Module):
    """An LSTM over time plus its input; with both directions the output is twice as wide, and the
    input is added to either half."""

    def __init__(self, channels: int, layers: int, *, bidirectional: bool = False):
        super().__init__()
        self.lstm = nn.LSTM(
            channels, channels, layers, batch_first=True, bidirectional=bidirectional
        )
        self.repeats = 1 + bidirectional

    def forward(self, x: Tensor) -> Tensor:
        rows = x.mT
        return (self.lstm(rows)[0] + rows.repeat(1, 1, self.repeats)).mT


# A normal variable has this size after an ELU, as a root of its mean square.
ELU_SIZE = math.sqrt(0.645)
LOUDNESS = 0.1  # of speech, about


@torch.no_grad()
def initialize_(half: nn.Sequential, *, out: float = 1.0) -> None:
    """Weights with which a signal of size 1 keeps it through all layers and leaves with `out`.

    Ours: with torch's own, the released codec's, what tells waves apart is a hundredth of the
    biases' doing at the codes, and it takes thousands of steps to be heard.
    """
    first, last = half[0], half[-1]
    for module in half.modules():
        if isinstance(module, ResidualUnit):
            # As much of the sum comes from either side.
            for conv, size in (
                (module.wide, ELU_SIZE),
                (module.narrow, ELU_SIZE * math.sqrt(2)),
                (module.shortcut, math.sqrt(2)),
            ):
                _draw_(conv.conv, 1 / size)
    for module in half:
        if isinstance(module, (PaddedConv, PaddedTransposed)):
            _draw_(module.conv, 1.0 if module is first else 1 / ELU_SIZE)
    last.conv.weight = last.conv.weight * out


def _draw_(conv: nn.Module, size: float) -> None:
    weight = conv.weight
    # Of a transposed convolution twice as wide as its stride two taps meet in each sample.
    inputs = 2 * weight.shape[0] if isinstance(conv, nn.ConvTranspose1d) else weight[0].numel()
    conv.weight = torch.randn_like(weight) * (size / math.sqrt(inputs))
    conv.bias.zero_()
