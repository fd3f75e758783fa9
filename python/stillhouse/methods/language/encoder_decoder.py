"""An encoder-decoder that reads its input once and writes with a third of its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stillhouse.methods.language.encoder_decoder_blocks import (
    Block,
    KeyValues,
    initialize_,
    rotation,
)
from stillhouse.methods.language.encoder_decoder_config import EncoderDecoderConfig


class Output(NamedTuple):
    """Logits [B, T, V]."""

    logits: Tensor


@dataclass
class DecoderCache:
    """What the decoder keeps of a batch: keys and values of the source, made once for each layer,
    and of its own tokens, layer by layer (nothing where there is no room for them)."""

    memory: list[tuple[Tensor, Tensor]]
    mask: Tensor | None
    own: list[KeyValues] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens decoded so far."""
        return self.own[0].length if self.own else 0

    @property
    def bytes_per_token(self) -> int:
        """What one more token of one sequence takes, in all layers."""
        return sum(each.bytes_per_token for each in self.own)


class EncoderDecoder(nn.Module):
    """Bidirectional layers over the source, causal ones with cross-attention over the target, one
    embedding for both and for the logits.

    As a module it takes `input_ids` [B, S], `attention_mask` [B, S] (1 or True = a token; None: all
    are) and `decoder_input_ids` [B, T], and gives an object with `logits` [B, T, V]; or in place of
    `input_ids` the tuple `encoder_outputs` that `get_encoder()` gave, as models of transformers do.
    Positions of the encoder are centred in each sequence, so that padding changes nothing; those of
    the decoder begin at 0; cross-attention has none. Weights are drawn from `seed`.
    Raises ValueError for a source without a token, a mask of another shape and use_cache=True:
    the cache is `generate`'s.

    Defaults: `EncoderDecoderConfig`'s. The released code masks whatever is token 0; here the mask
    counts.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import EncoderDecoder, EncoderDecoderConfig
        >>> sizes = dict(width=16, heads=2, kv_heads=1, head_size=8, ffn=32)
        >>> config = EncoderDecoderConfig(12, encoder_layers=2, decoder_layers=1, **sizes)
        >>> model = EncoderDecoder(config).eval()
        >>> source = torch.tensor([[5, 6, 7]])
        >>> model(source, decoder_input_ids=torch.tensor([[1, 3]])).logits.shape
        torch.Size([1, 2, 12])
        >>> model.generate(source, max_new_tokens=4, eos_token_id=()).shape
        torch.Size([1, 5])
    """

    def __init__(self, config: EncoderDecoderConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.generation_config: Any = SimpleNamespace(
            max_new_tokens=20,
            eos_token_id=config.eos_token_id,
            pad_token_id=0,
            decoder_start_token_id=config.decoder_start_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(config.vocab_size, config.width)
            encoder = (Block(config, causal=False) for _ in range(config.encoder_layers))
            decoder = (
                Block(config, causal=True, crosses=True) for _ in range(config.decoder_layers)
            )
            self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
            self.encoder_norm = nn.RMSNorm(config.width, eps=1e-6)
            self.decoder_norm = nn.RMSNorm(config.width, eps=1e-6)
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
            initialize_(self)
        self.head.weight = self.embedding.weight
        self.dropout = nn.Dropout(config.dropout)

    def get_output_embeddings(self) -> nn.Linear:
        """The head, whose weight is the embedding."""
        return self.head

    def get_encoder(self) -> Callable[..., tuple[Tensor]]:
        """The encoder by itself, as a function of `input_ids` and `attention_mask`."""
        return lambda input_ids, attention_mask=None: (self.encode(input_ids, attention_mask),)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The memory [B, S, width]."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids "
                f"{tuple(input_ids.shape)}"
            )
        mask = attention_mask.bool()
        length = mask.sum(1, keepdim=True)
        if not bool(length.all()):
            raise ValueError("a source has no token: all of its positions are masked")
        place = mask.cumsum(1) - 1 - (length - 1) // 2
        angles = self._angles(place[:, None])
        x = self.dropout(self.embedding(input_ids))
        for block in self.encoder:
            x = block(x, angles, mask[:, None, None])
        return self.encoder_norm(x)

    def remember(
        self, memory: Tensor, attention_mask: Tensor | None = None, *, room: int = 0
    ) -> DecoderCache:
        """The cache for a memory [B, S, width], with room for so many tokens of the decoder's own;
        without any, `decode` takes each call for the whole target."""
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        cross = [block.cross.keys_values(memory) for block in self.decoder]
        return DecoderCache(cross, mask, [KeyValues(room) for _ in cross] if room else [])

    def decode(self, decoder_input_ids: Tensor, cache: DecoderCache) -> Tensor:
        """What the head sees, [B, t, width], of the next t tokens."""
        place = torch.arange(decoder_input_ids.shape[1], device=decoder_input_ids.device)
        angles = self._angles(place + cache.length)
        x = self.dropout(self.embedding(decoder_input_ids))
        own = cache.own or [None] * len(self.decoder)
        for block, past, memory in zip(self.decoder, own, cache.memory, strict=True):
            x = block(x, angles, None, past, memory, cache.mask)
        return self.decoder_norm(x)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Sequence[Tensor] | None = None,
        use_cache: bool = False,
    ) -> Output:
        if use_cache:
            raise ValueError("the cache is generate's: call it, or remember and decode")
        if encoder_outputs is None:
            encoder_outputs = (self.encode(input_ids, attention_mask),)
        cache = self.remember(encoder_outputs[0], attention_mask)
        return Output(self.head(self.decode(decoder_input_ids, cache)))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: Any = None,
        *,
        max_new_tokens: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        decoder_start_token_id: int | None = None,
        logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    ) -> Tensor:
        """The start token and the likeliest tokens after it, int64 [B, 1 + n] with n at most
        `max_new_tokens`: what follows a row's end is `pad_token_id`.

        Arguments as in transformers; those that are None are `generation_config`'s, or without one
        the model's. The source is encoded once. Mode (dropout) is the caller's.
        """
        config = generation_config or self.generation_config

        def setting(name: str, given: Any) -> Any:
            return getattr(config, name) if given is None else given

        count = setting("max_new_tokens", max_new_tokens)
        ends = setting("eos_token_id", eos_token_id)
        ends = torch.as_tensor([] if ends is None else ends, device=input_ids.device).long()
        pad = setting("pad_token_id", pad_token_id)
        start = setting("decoder_start_token_id", decoder_start_token_id)
        cache = self.remember(self.encode(input_ids, attention_mask), attention_mask, room=count)
        ids = input_ids.new_full((len(input_ids), 1), start)
        finished = torch.zeros_like(ids[:, 0], dtype=torch.bool)
        for _ in range(count):
            scores = self.head(self.decode(ids[:, -1:], cache))[:, -1]
            for processor in logits_processor:
                scores = processor(ids, scores)
            token = scores.argmax(-1).masked_fill(finished, pad)
            ids = torch.cat([ids, token[:, None]], 1)
            finished |= torch.isin(token, ends)
            if bool(finished.all()):
                break
        return ids

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        return rotation(positions, config.head_size, config.theta, config.ntk)
