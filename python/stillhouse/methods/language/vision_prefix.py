"""Features of another modality in front of the tokens of a causal language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.train.rows import IGNORED


class VisionPrefix(nn.Module):
    """A causal language model some of whose input embeddings are projected features.

    Wherever `input_ids` is `token`, the next of `projector(features)` stands in the place of that
    token's embedding. features: [B, P, F], what a frozen encoder makes of B images (LLaVA: the last
    but one layer of a CLIP ViT); projector: a module from F to the model's width; token: an id of
    the vocabulary that text does not use. `expand(batch, features)` puts P of them in front of a
    language-model batch [B, T]: what is supervised stays, shifted by P, and whatever reads such
    batches (`Taught`, `sequence_logprobs`, `fidelity`) reads this one. Student and teacher may have
    different P: rows are matched by what they predict.
    Raises ValueError in the call where the number of tokens is not that of features, and in
    `expand` for other batch sizes and text that has the token.

    Defaults: none; LLaVA's projector is Linear, GELU, Linear.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillhouse.methods.language import VisionPrefix
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1, vocab_size=16)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> prefix = VisionPrefix(model, nn.Linear(6, 8), token=15)
        >>> ids = torch.tensor([[3, 1, 2]])
        >>> batch = prefix.expand({"input_ids": ids, "labels": ids}, torch.randn(1, 4, 6))
        >>> prefix(batch["input_ids"], features=batch["features"]).logits.shape
        torch.Size([1, 7, 16])
    """

    def __init__(self, model: nn.Module, projector: nn.Module, token: int):
        super().__init__()
        self.model, self.projector, self.token = model, projector, token

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.get_output_embeddings()

    def forward(self, input_ids: Tensor, features: Tensor | None = None, **options: Any) -> Any:
        """The model's output; without features that of the ids as they are."""
        if features is None:
            return self.model(input_ids=input_ids, **options)
        place = input_ids == self.token
        if bool((place.sum(1) != features.shape[1]).any()) or len(place) != len(features):
            raise ValueError(
                f"expected {features.shape[1]} tokens {self.token} a sequence, one for each "
                f"feature of {tuple(features.shape)}, got {place.sum(1).tolist()}"
            )
        embedded = self.model.get_input_embeddings()(input_ids)
        projected = self.projector(features).to(embedded.dtype)
        embedded = embedded.masked_scatter(place[..., None], projected)
        return self.model(inputs_embeds=embedded, **options)

    def expand(self, batch: Mapping[str, Any], features: Tensor) -> dict[str, Any]:
        """The batch with P tokens for features [B, P, F] before each sequence, and the features."""
        ids = batch["input_ids"]
        if len(ids) != len(features):
            raise ValueError(f"{len(ids)} sequences and features of {len(features)} images")
        if bool((ids == self.token).any()):
            raise ValueError(f"the text has the token {self.token}, which stands for a feature")
        before = {"input_ids": self.token, "attention_mask": 1, "labels": IGNORED}
        longer = {
            name: torch.cat([ids.new_full(features.shape[:2], fill), batch[name]], 1)
            for name, fill in before.items()
            if name in batch
        }
        return {**batch, **longer, "features": features}
