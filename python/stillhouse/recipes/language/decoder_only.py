"""A causal language model of the encoder-decoder's blocks, to compare like with like."""

import torch
from torch import Tensor, nn

from stillhouse.methods.language import EncoderDecoderConfig
from stillhouse.methods.language.encoder_decoder import Output
from stillhouse.methods.language.encoder_decoder_blocks import (
    Block,
    KeyValues,
    initialize_,
    rotation,
)


class DecoderOnly(nn.Module):
    """Logits [B, T, V] of ids [B, T] that are padded on the right, if at all; `layers` blocks of
    the sizes of `config`."""

    def __init__(self, config: EncoderDecoderConfig, layers: int, *, seed: int):
        super().__init__()
        self.sizes = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(config.vocab_size, config.width)
            self.blocks = nn.ModuleList(Block(config, causal=True) for _ in range(layers))
            self.norm = nn.RMSNorm(config.width, eps=1e-6)
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
            initialize_(self)
        self.head.weight = self.embedding.weight
        self.dropout = nn.Dropout(config.dropout)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> Output:
        return Output(self.head(self.read(input_ids)))

    def read(self, ids: Tensor, past: list[KeyValues] | None = None) -> Tensor:
        """What the head sees of the next t tokens, [B, t, width]."""
        start = past[0].length if past else 0
        place = torch.arange(start, start + ids.shape[1])
        angles = rotation(place, self.sizes.head_size, self.sizes.theta)
        x = self.dropout(self.embedding(ids))
        for block, own in zip(self.blocks, past or [None] * len(self.blocks), strict=True):
            x = block(x, angles, None, own)
        return self.norm(x)


def parameters(model: nn.Module) -> int:
    """Numbers that are trained, a shared one once."""
    return sum(each.numel() for each in model.parameters())
