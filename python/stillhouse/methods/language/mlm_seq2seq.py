"""A masked language model as both halves of a translator: encoder, and decoder with gates at 0."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from stillhouse.nn.surgery import blocks


def seq2seq_from_mlm(mlm: nn.Module) -> tuple[nn.Module, GatedDecoder]:
    """(encoder, decoder) for `UnrolledDenoiser`: two copies of a masked language model, the first
    without its output head, the second with cross-attention in every block.

    mlm: a `transformers` model with BERT's layout (such as ELECTRA), not changed.
    Raises ValueError for a model of another layout, a causal one, and one without an output head.

    Defaults: a copy of the block's own self-attention is its cross-attention (the thesis, from
    memory); one gate a block, 0 (ours).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language.mlm_seq2seq import seq2seq_from_mlm
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
        >>> mlm = BertForMaskedLM(BertConfig(vocab_size=16, intermediate_size=8, **sizes)).eval()
        >>> encoder, decoder = seq2seq_from_mlm(mlm)
        >>> source, ids = torch.tensor([[3, 1, 2]]), torch.tensor([[5, 6]])
        >>> states = encoder(source).last_hidden_state
        >>> real = torch.ones_like(source).bool(), torch.ones_like(ids).bool()
        >>> logits = decoder(ids, real[1], states, real[0])
        >>> bool((logits == mlm(ids).logits).all())  # as long as the gates are 0
        True
    """
    return copy.deepcopy(mlm.base_model), GatedDecoder(mlm)


class GatedDecoder(nn.Module):
    """Logits of a masked language model whose blocks also attend to a source: after its attention
    a block's states x become x + gate * cross(x, source), and no norm follows, so that with all
    gates at 0 the logits are the model's own. See `seq2seq_from_mlm`."""

    def __init__(self, mlm: nn.Module):
        super().__init__()
        if getattr(mlm, "get_output_embeddings", lambda: None)() is None:
            raise ValueError(f"{type(mlm).__name__} has no output head: pass a masked LM")
        if getattr(mlm.config, "is_decoder", False):
            raise ValueError("a masked LM sees both sides of a token: this one has is_decoder=True")
        self.mlm, self.config = copy.deepcopy(mlm), mlm.config
        _, layers = blocks(self.mlm)
        self.cross = nn.ModuleList(_GatedCross(layer) for layer in layers)

    def forward(self, ids: Tensor, mask: Tensor, states: Tensor, source_mask: Tensor) -> Tensor:
        """ids int64 [B, T] with mask bool [B, T], source states [B, S, D] with mask bool [B, S] to
        logits [B, T, V]."""

        def hook(cross: nn.Module) -> Any:
            def after(module: nn.Module, args: Any, output: Any) -> Any:
                x = output[0] if isinstance(output, tuple) else output
                x = x + cross(x, states, source_mask)
                return (x, *output[1:]) if isinstance(output, tuple) else x

            return after

        handles = []
        try:
            for layer, cross in zip(blocks(self.mlm)[1], self.cross, strict=True):
                handles.append(layer.attention.register_forward_hook(hook(cross)))
            return self.mlm(input_ids=ids, attention_mask=mask.long()).logits
        finally:
            for handle in handles:
                handle.remove()


class _GatedCross(nn.Module):
    """gate * output(attention(query(x), key(states), value(states))), of a block's own weights."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        try:
            inner, dense = layer.attention.self, layer.attention.output.dense
            parts = inner.query, inner.key, inner.value, dense
            self.heads = inner.num_attention_heads
        except AttributeError as error:
            raise ValueError(
                f"{type(layer).__name__} has not BERT's layout ({error}): expected "
                "attention.self.{query, key, value} and attention.output.dense"
            ) from None
        self.query, self.key, self.value, self.output = map(copy.deepcopy, parts)
        self.gate = nn.Parameter(torch.zeros_like(dense.weight[0, 0]))

    def forward(self, x: Tensor, states: Tensor, source_mask: Tensor) -> Tensor:
        q, k, v = (
            part(of).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, of in ((self.query, x), (self.key, states), (self.value, states))
        )
        found = scaled_dot_product_attention(q, k, v, attn_mask=source_mask[:, None, None, :])
        return self.gate * self.output(found.transpose(1, 2).flatten(2))
