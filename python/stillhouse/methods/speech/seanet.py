"""A speech codec: SEANet, a residual quantizer between its halves, and its stages' features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stillhouse.methods.speech.codec_config import CodecConfig
from stillhouse.methods.speech.seanet_blocks import (
    LOUDNESS,
    PaddedConv,
    PaddedTransposed,
    ResidualUnit,
    SkipLSTM,
    initialize_,
)
from stillhouse.methods.speech.stages import Stage, stage_average, stage_range
from stillhouse.nn import ResidualVQ


class CodecOutput(NamedTuple):
    """What a codec made of a batch."""

    audio: Tensor  # [B, S]
    codes: Tensor  # int64 [B, T, Q]
    commit_loss: Tensor  # [Q], mean squared distance of each stage's input from its code
    stages: dict[Stage, Tensor]  # [B, T, D] each, by the names that were asked for


class SpeechCodec(nn.Module):
    """Waveforms as a few codes a frame, and back.

    wave: [B, S] at the configuration's sample rate, at least one hop long; it has ceil(S / hop)
    frames. The call quantizes with a gradient (straight through, the identity) and gives audio of
    the wave's length, codes, each stage's commitment loss, and for `return_stages`, names as 1,
    "3" or "1:Q", the mean of what these stages have added, whose gradient to the encoder is
    that of the mean of so many stages: not zero for later ones, which the released code's are,
    where "1:8" is stage 1 alone. In training the quantizer's tables follow the frames; weights and
    tables begin from `seed`.
    `encode(wave)` gives codes [B, T, Q], `decode(codes)` of any first stages audio [B, T hop].
    Raises ValueError for a wave of another shape, shorter than a hop or at another `sample_rate`,
    for a number of quantizers or a stage that does not exist, and codes of another shape;
    TypeError for a wave that is not of floats.

    Defaults: `CodecConfig`'s, the released model's. No tanh at the end, as there.

    Example:
        >>> import torch
        >>> from stillhouse.methods.speech import CodecConfig, SpeechCodec
        >>> codec = SpeechCodec(CodecConfig.small())
        >>> found = codec(torch.randn(2, 3200), return_stages=(1, "1:Q"))
        >>> found.audio.shape, found.codes.shape, found.stages[1].shape
        (torch.Size([2, 3200]), torch.Size([2, 10, 8]), torch.Size([2, 10, 64]))
        >>> codec.decode(codec.encode(torch.randn(1, 1000), num_quantizers=3)).shape
        torch.Size([1, 1280])
    """

    def __init__(self, config: CodecConfig | None = None, *, seed: int = 0):
        super().__init__()
        self.config = config = CodecConfig() if config is None else config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder, self.decoder = _encoder(config), _decoder(config)
            initialize_(self.encoder)
            initialize_(self.decoder, out=LOUDNESS)
        self.quantizer = ResidualVQ(
            config.dim,
            config.codebook_size,
            config.num_quantizers,
            decay=config.decay,
            dead_code_threshold=config.dead_code_threshold,
            seed=seed,
        )

    def forward(
        self,
        wave: Tensor,
        *,
        num_quantizers: int | None = None,
        return_stages: Sequence[Stage] = (),
        sample_rate: int | None = None,
    ) -> CodecOutput:
        self._check_wave(wave, sample_rate)
        depth = self._depth(num_quantizers)
        ranges = {stage: stage_range(stage, depth) for stage in return_stages}
        encoded = self.encoder(wave[:, None]).mT
        tables = None
        if ranges:
            # In training the tables move once they have given the codes.
            if self.training:
                self.quantizer.initialize_(encoded)
            tables = self.quantizer.codebooks.detach().clone()
        found = self.quantizer(encoded, num_quantizers=depth)
        audio = self.decoder(found.out.mT)[:, 0, : wave.shape[1]]
        stages = {
            stage: stage_average(encoded, found.codes, tables, *ends)
            for stage, ends in ranges.items()
        }
        return CodecOutput(audio, found.codes, found.commit_loss, stages)

    @torch.no_grad()
    def encode(
        self, wave: Tensor, num_quantizers: int | None = None, *, sample_rate: int | None = None
    ) -> Tensor:
        """int64 [B, ceil(S / hop), Q], of the first `num_quantizers` stages."""
        self._check_wave(wave, sample_rate)
        encoded = self.encoder(wave[:, None]).mT
        return self.quantizer.encode(encoded, num_quantizers=self._depth(num_quantizers))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """[B, T hop] of codes [B, T, n], n up to the number of stages; -1 is a stage left out."""
        most = self.config.num_quantizers
        if codes.dim() != 3 or not 1 <= codes.shape[2] <= most or not codes.shape[1]:
            raise ValueError(f"codes must be [B, T, 1 to {most}], got {tuple(codes.shape)}")
        return self.decoder(self.quantizer.decode(codes).mT)[:, 0]

    def _depth(self, number: int | None) -> int:
        most = self.config.num_quantizers
        if number is None:
            return most
        if not 1 <= number <= most:
            raise ValueError(f"num_quantizers must be 1 to {most}, got {number}")
        return number

    def _check_wave(self, wave: Tensor, sample_rate: int | None) -> None:
        config = self.config
        if wave.dim() != 2:
            raise ValueError(f"wave must be [B, S], got {tuple(wave.shape)}")
        if not wave.is_floating_point():
            raise TypeError(f"wave must be a float tensor, got {wave.dtype}")
        if sample_rate is not None and sample_rate != config.sample_rate:
            raise ValueError(
                f"the wave is at {sample_rate} Hz, the codec at {config.sample_rate}: resample it"
            )
        if wave.shape[1] < config.hop:
            raise ValueError(f"{wave.shape[1]} samples are less than a frame of {config.hop}")


def _encoder(config: CodecConfig) -> nn.Sequential:
    options: dict[str, Any] = dict(causal=config.causal, padding=config.padding)
    width = config.width
    layers: list[nn.Module] = [PaddedConv(1, width, config.kernel, **options)]
    for stride in config.strides:
        layers += _units(config, width)
        layers += [nn.ELU(), PaddedConv(width, 2 * width, 2 * stride, stride=stride, **options)]
        width *= 2
    if config.lstm_layers:
        layers.append(SkipLSTM(width, config.lstm_layers, bidirectional=config.bidirectional))
        width *= 1 + config.bidirectional
    layers += [nn.ELU(), PaddedConv(width, config.dim, config.kernel, **options)]
    return nn.Sequential(*layers)


def _decoder(config: CodecConfig) -> nn.Sequential:
    options: dict[str, Any] = dict(causal=config.causal, padding=config.padding)
    width = config.width * 2 ** len(config.strides)
    layers: list[nn.Module] = [PaddedConv(config.dim, width, config.kernel, **options)]
    if config.lstm_layers:
        layers.append(SkipLSTM(width, config.lstm_layers))
    for stride in reversed(config.strides):
        layers += [nn.ELU(), PaddedTransposed(width, width // 2, stride, causal=config.causal)]
        width //= 2
        layers += _units(config, width)
    layers += [nn.ELU(), PaddedConv(width, 1, config.kernel, **options)]
    return nn.Sequential(*layers)


def _units(config: CodecConfig, width: int) -> list[nn.Module]:
    options: dict[str, Any] = dict(causal=config.causal, padding=config.padding)
    return [
        ResidualUnit(
            width, config.residual_kernel, config.dilation_base**j, config.compress, **options
        )
        for j in range(config.residual_units)
    ]
