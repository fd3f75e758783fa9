"""How large a speech codec is."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of a `SpeechCodec`.

    strides: of the encoder's blocks, first to last, the decoder's in reverse; their product is the
    hop. width: channels of the first convolution, doubled by each block. dim: of the latent frames
    and of the codes. kernel: of the first and the last convolution. dilation_base: unit j of a
    block has dilation dilation_base^j. compress: a unit's width over its bottleneck's.
    bidirectional: the encoder's LSTM looks both ways, and is twice as wide above. causal: no sample
    depends on a later one; with padding "reflect" the first few frames do. padding: "reflect" or
    "constant" (zeros). decay, dead_code_threshold: of the tables, as `nn.ResidualVQ` has them.
    Raises ValueError for sizes below 1, strides that are not, a bottleneck without a channel, a
    causal codec whose LSTM looks ahead, and another padding.

    Defaults: the paper's, whose released configuration these are (SpeechTokenizer's): 16 kHz, 50
    frames a second, 8 stages of 1024 codes, 4 kbit/s. Its replacement of dead codes has no effect
    (the same step writes over it), ours is Mimi's. `CodecConfig.small()` is ours, for two cores.

    Example:
        >>> from stillhouse.methods.speech import CodecConfig
        >>> CodecConfig().hop, CodecConfig().frame_rate, CodecConfig().bit_rate
        (320, 50.0, 4000.0)
        >>> CodecConfig.small(num_quantizers=4).num_quantizers
        4
    """

    sample_rate: int = 16000
    strides: tuple[int, ...] = (2, 4, 5, 8)
    width: int = 64
    dim: int = 1024
    codebook_size: int = 1024
    num_quantizers: int = 8
    kernel: int = 7
    residual_kernel: int = 3
    residual_units: int = 1
    dilation_base: int = 2
    compress: int = 2
    lstm_layers: int = 2
    bidirectional: bool = True
    causal: bool = False
    padding: str = "reflect"
    decay: float = 0.99
    dead_code_threshold: float = 0.1

    def __post_init__(self) -> None:
        # A configuration that was read from JSON has a list.
        object.__setattr__(self, "strides", tuple(self.strides))
        zero = ("lstm_layers", "residual_units")
        for field in fields(self):
            number = getattr(self, field.name)
            if field.type == "int" and number < (field.name not in zero):
                raise ValueError(f"{field.name} must be at least 1, got {number}")
        if not self.strides or min(self.strides) < 1:
            raise ValueError(f"strides must be positive, got {self.strides}")
        if self.residual_units and self.width < self.compress:
            raise ValueError(f"a bottleneck of {self.width} / {self.compress} channels has none")
        if self.causal and self.bidirectional and self.lstm_layers:
            raise ValueError("a causal codec cannot look both ways: pass bidirectional=False")
        if self.padding not in ("reflect", "constant"):
            raise ValueError(f"padding must be 'reflect' or 'constant', got {self.padding!r}")

    @classmethod
    def small(cls, **changes: Any) -> CodecConfig:
        """About 0.7M parameters, 50 frames a second, 8 stages of 256 codes: 3.2 kbit/s."""
        sizes = cls(width=8, dim=64, codebook_size=256, lstm_layers=1, bidirectional=False)
        return replace(sizes, **changes)

    @property
    def hop(self) -> int:
        """Samples of a frame."""
        return math.prod(self.strides)

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.sample_rate / self.hop

    @property
    def bit_rate(self) -> float:
        """Bits a second of all stages."""
        return self.frame_rate * self.num_quantizers * math.log2(self.codebook_size)
