"""What tells real speech from a codec's: by periods, by scales, by spectra."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, leaky_relu, pad
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Which discriminators `codec_discriminators` makes, and how wide.

    periods: a discriminator each of the wave folded into columns. scales: as many, of the wave and
    of its halves. share: of the published channels of these two. windows: a discriminator each of
    spectra with such a window, with `filters` channels.
    Raises ValueError where there is none, for windows below 4, other numbers below 1 and a share
    outside (0, 1].

    Defaults: the released trainer's, five periods and three scales (HiFi-GAN's, arXiv 2010.05646)
    and five spectra (EnCodec's, arXiv 2210.13438). `small()` is ours: three spectra, two periods.

    Example:
        >>> from stillhouse.methods.speech import DiscriminatorConfig
        >>> DiscriminatorConfig.small(periods=()).windows
        (1024, 512, 256)
    """

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    scales: int = 3
    share: float = 1.0
    windows: tuple[int, ...] = (1024, 2048, 512, 256, 128)
    filters: int = 32

    def __post_init__(self) -> None:
        for name in ("periods", "windows"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not (self.periods or self.scales or self.windows):
            raise ValueError("no discriminator: periods, scales or windows are needed")
        if min([*self.periods, *self.windows, self.filters], default=1) < 1 or self.scales < 0:
            raise ValueError(f"periods, windows and filters must be positive, got {self}")
        if min(self.windows, default=4) < 4:
            raise ValueError(f"windows have 4 samples or more, got {self.windows}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share of the channels must be in (0, 1], got {self.share}")

    @classmethod
    def small(cls, **changes: Any) -> DiscriminatorConfig:
        """Two periods and three spectra, 84,000 parameters."""
        sizes = cls(periods=(2, 3), scales=0, share=1 / 16, windows=(1024, 512, 256), filters=8)
        return replace(sizes, **changes)


class Judged(NamedTuple):
    """What discriminators say of a batch."""

    scores: list[Tensor]  # of each discriminator [B, ...]: high = real
    features: list[list[Tensor]]  # of each discriminator, layer by layer


class Discriminators(nn.Module):
    """All of them side by side: wave [B, S] to `Judged`."""

    def __init__(self, judges: list[nn.Module]):
        super().__init__()
        self.judges = nn.ModuleList(judges)

    def forward(self, wave: Tensor) -> Judged:
        if wave.dim() != 2:
            raise ValueError(f"wave must be [B, S], got {tuple(wave.shape)}")
        judged = [judge(wave[:, None]) for judge in self.judges]
        return Judged([score for score, _ in judged], [features for _, features in judged])


def codec_discriminators(
    config: DiscriminatorConfig | None = None, *, seed: int = 0
) -> Discriminators:
    """The discriminators of a codec, as a module that takes a wave [B, S] and gives lists with a
    member for each: `scores`, high = real, and `features`, layer by layer (with the score itself at
    the end, those of spectra aside, as in the released code). Weights are drawn from `seed`.

    Raises ValueError for a wave of another shape, shorter than the longest window or too short to
    be reflected up to a period.

    Defaults: `DiscriminatorConfig`'s, 13 of them with 71M parameters.

    Example:
        >>> import torch
        >>> from stillhouse.methods.speech import DiscriminatorConfig, codec_discriminators
        >>> judge = codec_discriminators(DiscriminatorConfig.small())
        >>> judged = judge(torch.randn(2, 4000))
        >>> len(judged.scores), [len(layers) for layers in judged.features]
        (5, [6, 6, 5, 5, 5])
    """
    config = DiscriminatorConfig() if config is None else config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judges: list[nn.Module] = [ByPeriod(p, config.share) for p in config.periods]
        judges += [ByScale(s, config.share) for s in range(config.scales)]
        judges += [BySpectrum(window, config.filters) for window in config.windows]
    return Discriminators(judges)


class ByPeriod(nn.Module):
    """Samples a period apart stand in a column, and columns are convolved each by itself."""

    WIDTHS = (32, 128, 512, 1024, 1024)

    def __init__(self, period: int, share: float = 1.0):
        super().__init__()
        self.period = period
        widths = [1, *(max(int(w * share), 1) for w in self.WIDTHS)]
        strides = (3, 3, 3, 3, 1)
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), (stride, 1), padding=(2, 0)))
            for a, b, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.last = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wave: Tensor) -> tuple[Tensor, list[Tensor]]:
        missing = -wave.shape[-1] % self.period
        if missing >= wave.shape[-1]:
            raise ValueError(f"{wave.shape[-1]} samples are too few for a period of {self.period}")
        wave = pad(wave, (0, missing), "reflect")
        return _through(self, wave.unflatten(-1, (-1, self.period)), 0.1)


class ByScale(nn.Module):
    """The wave, or its mean over pairs of samples `halvings` times over, by long filters."""

    # Channels, filter, stride, groups.
    LAYERS = (
        (128, 15, 1, 1),
        (128, 41, 2, 4),
        (256, 41, 2, 16),
        (512, 41, 4, 16),
        (1024, 41, 4, 16),
        (1024, 41, 1, 16),
        (1024, 5, 1, 1),
    )

    def __init__(self, halvings: int, share: float = 1.0):
        super().__init__()
        self.halvings = halvings
        # The wave itself is judged by layers of bounded gain, as HiFi-GAN has it.
        norm = weight_norm if halvings else spectral_norm
        self.layers, before = nn.ModuleList(), 1
        for width, filter_, stride, groups in self.LAYERS:
            width = max(round(width * share / 16), 1) * 16
            conv = nn.Conv1d(before, width, filter_, stride, filter_ // 2, groups=groups)
            self.layers.append(norm(conv))
            before = width
        self.last = norm(nn.Conv1d(before, 1, 3, padding=1))

    def forward(self, wave: Tensor) -> tuple[Tensor, list[Tensor]]:
        for _ in range(self.halvings):
            wave = avg_pool1d(wave, 4, 2, padding=2)
        return _through(self, wave, 0.1)


class BySpectrum(nn.Module):
    """Real and imaginary parts of spectra, as pictures of time by frequency."""

    def __init__(self, window: int, filters: int):
        super().__init__()
        self.window = window
        dilations = (1, 2, 4)
        # As released: the first layer has no norm.
        layers: list[nn.Module] = [nn.Conv2d(2, filters, (3, 9), padding=(1, 4))]
        for dilation in dilations:
            options = dict(stride=(1, 2), dilation=(dilation, 1), padding=(dilation, 4))
            layers.append(weight_norm(nn.Conv2d(filters, filters, (3, 9), **options)))
        layers.append(weight_norm(nn.Conv2d(filters, filters, 3, padding=1)))
        self.layers = nn.ModuleList(layers)
        self.last = weight_norm(nn.Conv2d(filters, 1, 3, padding=1))

    def forward(self, wave: Tensor) -> tuple[Tensor, list[Tensor]]:
        if wave.shape[-1] < self.window:
            raise ValueError(f"{wave.shape[-1]} samples are less than a window of {self.window}")
        score, features = _through(self, self.spectrum(wave), 0.2)
        return score, features[:-1]

    def spectrum(self, wave: Tensor) -> Tensor:
        """[B, 2, frames, window / 2 + 1], of windows of length 1 every quarter of one."""
        window = torch.hann_window(self.window, dtype=wave.dtype, device=wave.device)
        window = window / math.sqrt(3 / 8 * self.window)
        spectrum = torch.stft(
            wave[:, 0],
            self.window,
            self.window // 4,
            window=window,
            center=False,
            return_complex=True,
        )
        return torch.view_as_real(spectrum.mT).permute(0, 3, 1, 2)


def _through(judge: nn.Module, x: Tensor, slope: float) -> tuple[Tensor, list[Tensor]]:
    """The score, and what each layer gave, the last one included."""
    features = []
    for layer in judge.layers:
        x = leaky_relu(layer(x), slope)
        features.append(x)
    score = judge.last(x)
    return score.flatten(1), [*features, score]
