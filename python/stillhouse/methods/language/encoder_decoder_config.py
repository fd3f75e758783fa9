"""How large an encoder-decoder is, and how its layers are shared out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


def layer_split(total: int, encoder_fraction: float = 2 / 3) -> tuple[int, int]:
    """Layers of encoder and decoder, `encoder_fraction` of `total` rounded to the encoder.

    Raises ValueError where either has none.

    Defaults: two thirds (the paper's best: 20 and 10 of 30).

    Example:
        >>> from stillhouse.methods.language import layer_split
        >>> layer_split(30), layer_split(6, 1 / 2)
        ((20, 10), (3, 3))
    """
    encoder = round(total * encoder_fraction)
    if not 1 <= encoder < total:
        raise ValueError(
            f"a share of {encoder_fraction:.3g} of {total} layers leaves {encoder} to the encoder "
            f"and {total - encoder} to the decoder: each needs at least one"
        )
    return encoder, total - encoder


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Sizes of an `EncoderDecoder`. heads query heads of head_size share kv_heads keys and values;
    ntk > 1 stretches the positions; ffn is the width within the MLP.

    Raises ValueError for a half without a layer, heads that kv_heads does not divide, an odd
    head_size and a dropout outside [0, 1).

    Defaults: the released model of about 330M parameters; the special tokens are Llama's.

    Example:
        >>> from stillhouse.methods.language import EncoderDecoderConfig
        >>> EncoderDecoderConfig(vocab_size=32128).encoder_layers
        20
    """

    vocab_size: int
    width: int = 1024
    encoder_layers: int = 20
    decoder_layers: int = 10
    heads: int = 6
    kv_heads: int = 3
    head_size: int = 64
    ffn: int = 4096
    dropout: float = 0.1
    theta: float = 1e4
    ntk: float = 1.0
    interleaved: bool = False
    decoder_start_token_id: int = 1
    eos_token_id: int | None = 2
    is_encoder_decoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        layers = self.encoder_layers, self.decoder_layers
        if min(layers) < 1:
            raise ValueError(f"encoder and decoder need a layer each, got {layers}")
        if self.heads % self.kv_heads or self.head_size % 2:
            raise ValueError(
                f"{self.heads} heads cannot share {self.kv_heads} keys evenly, or a head of "
                f"{self.head_size} features is not even"
            )
        if not 0 <= self.dropout < 1 or self.ntk < 1:
            raise ValueError(
                f"expected dropout in [0, 1) and ntk >= 1, got {self.dropout} and {self.ntk}"
            )
