"""MEND: a small model writes demonstrations down as a few vectors that a frozen one can read.

In-context learning pays for its demonstrations at every query. MEND's distiller reads them once
and gives l vectors in the space of the language model's embeddings; behind them the model must say
what it says behind the demonstrations themselves. The distiller is trained on many tasks and
needs no training for a new one.

Equation, distiller G of width d_G, frozen language model F of width d_F, demonstrations D, query
with its answer (x, y), placeholders P [l, d_G]:

    Z = G([emb_G(D); P]) at the last l places;   vectors = Z, or tanh(W Z + b) where d_G != d_F

    KD = mean over (x, y) of KL( F([D; x, y]) || F([vectors; x, y]) ),   CE = -mean over y log F

    stage A: L = KD on plain text, its first 80 % as D      stage B: L = KD + CE on tasks

Paper: MEND: Meta dEmonstratioN Distillation for Efficient and Effective In-Context Learning,
ICLR 2024, arXiv 2403.06914. Code by its authors: bigheiniu/MEND.

Where we say more than they do: their masks select the tokens to compare on each side by
themselves, and a teacher's input that was cut shifts one of them in silence; here demonstrations
alone are cut, on the left, and both sides must have read the same query. Encoder-decoder models
are left out, and so are the code's other attention masks, which are ablations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.methods.language.context_distillation import context_distillation_loss
from stillhouse.methods.language.demonstrations import build_icl_batch, split_for_pretraining
from stillhouse.methods.language.prefix_scores import prefix_cache, score_candidates
from stillhouse.methods.language.side_by_side import row_lengths, side_by_side

__all__ = [
    "ContextDistiller",
    "build_icl_batch",
    "context_distillation_loss",
    "prefix_cache",
    "score_candidates",
    "split_for_pretraining",
]


class ContextDistiller(nn.Module):
    """(demo_ids [B, D], mask) -> vectors [B, l, width_out], in place of the demonstrations.

    encoder: a causal model of `transformers`, of which the body is used: it learns, and is not
    copied. demo_ids: int64, in the encoder's tokens, padded on the right where mask (bool) is
    False. window: the tokens that the encoder can read, placeholders included (None: its
    `max_position_embeddings`). truncate: longer demonstrations lose their first tokens.
    Placeholders begin as embeddings of random tokens, those below `first_id` (often special) left
    out; `generator` draws them and, where the widths differ, the projection.
    Raises ValueError for vectors < 1, a window with no room for demonstrations, a vocabulary
    without tokens from first_id on, and for longer demonstrations without truncate.

    Defaults: vectors 100 (paper; the code's flag has 5), first_id 100 (code).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import ContextDistiller
        >>> from transformers import GPT2Config, GPT2Model
        >>> small = GPT2Model(GPT2Config(vocab_size=256, n_embd=8, n_layer=1, n_head=1))
        >>> distiller = ContextDistiller(small, width_out=16, vectors=5)
        >>> distiller(torch.tensor([[7, 8, 9]])).shape
        torch.Size([1, 5, 16])
    """

    def __init__(
        self,
        encoder: nn.Module,
        width_out: int,
        vectors: int = 100,
        *,
        window: int | None = None,
        truncate: bool = False,
        first_id: int = 100,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if window is None:
            window = encoder.config.max_position_embeddings
        if not 1 <= vectors < window:
            raise ValueError(f"vectors must lie in [1, {window - 1}], below the window: {vectors}")
        self.encoder = getattr(encoder, "base_model", encoder)
        self.window, self.truncate = window, truncate
        embedded = self.encoder.get_input_embeddings().weight
        if not 0 <= first_id < len(embedded):
            raise ValueError(f"first_id must lie in [0, {len(embedded)}), got {first_id}")
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        ids = torch.randint(first_id, len(embedded), (vectors,), generator=generator)
        self.placeholders = nn.Parameter(embedded[ids.to(embedded.device)].detach().clone())
        self.projection = None
        if embedded.shape[1] != width_out:
            drawn = torch.randn(width_out, embedded.shape[1], generator=generator)
            self.projection = nn.utils.skip_init(nn.Linear, embedded.shape[1], width_out)
            with torch.no_grad():
                self.projection.weight.copy_(drawn / embedded.shape[1] ** 0.5)
                self.projection.bias.zero_()
            self.projection.to(embedded)

    def forward(self, demo_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors [B, l, width_out] of demonstrations [B, D]."""
        lengths = row_lengths("demo", demo_ids, mask)
        room = self.window - len(self.placeholders)
        if not self.truncate and bool((lengths > room).any()):
            raise ValueError(
                f"demonstrations of {int(lengths.max())} tokens do not fit into the window of "
                f"{self.window} with {len(self.placeholders)} vectors: shorten them, or truncate"
            )
        skip = (lengths - room).clamp(min=0)
        places = self.placeholders.expand(len(demo_ids), -1, -1)
        embedded = self.encoder.get_input_embeddings()(demo_ids)
        inputs = side_by_side(embedded, places, lengths, lengths * 0 + places.shape[1], skip)
        states = self.encoder(inputs_embeds=inputs, use_cache=False).last_hidden_state
        place = (lengths - skip)[:, None] + torch.arange(places.shape[1], device=demo_ids.device)
        states = torch.take_along_dim(states, place[..., None], 1)
        return states if self.projection is None else torch.tanh(self.projection(states))
