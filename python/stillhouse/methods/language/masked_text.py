"""Masked text in which rare words come first, and embeddings for another tokenizer."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def rare_word_masking(
    ids: Tensor,
    counts: Tensor,
    *,
    mask_id: int,
    special_ids: Sequence[int] = (),
    prop: float = 0.15,
    smoothing: float = 0.7,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Text with ceil(prop n) of its n ordinary tokens to be predicted, rare ones before common.

    ids: int64 [B, T]; counts [V]: how often each token was seen. Tokens are drawn without
    replacement over the batch, with weights max(count, 1)^-smoothing; `special_ids`, padding among
    them, and the mask itself are never drawn. Of the drawn 80 % become `mask_id`, 10 % another
    ordinary token, 10 % stay. Returns the new ids and bool [B, T], True = drawn.
    Raises ValueError for prop outside (0, 1), ids outside the counts, and no ordinary token.

    Defaults: prop 0.15, smoothing 0.7, shares 80 / 10 / 10 (DistilBERT).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import rare_word_masking
        >>> ids = torch.tensor([[1, 5, 6, 7, 8, 9, 2, 0]])
        >>> new, masked = rare_word_masking(
        ...     ids, torch.ones(12), mask_id=3, special_ids=(0, 1, 2), prop=0.3,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> int(masked.sum()), bool((new[~masked] == ids[~masked]).all())
        (2, True)
    """
    if not 0 < prop < 1:
        raise ValueError(f"prop must lie in (0, 1), got {prop}")
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < len(counts)):
        raise ValueError(f"ids must lie within the {len(counts)} counts, up to {int(ids.max())}")
    ordinary = torch.ones(len(counts), dtype=torch.bool, device=ids.device)
    ordinary[[mask_id, *special_ids]] = False
    weight = counts.to(ids.device).double().clamp(min=1) ** -smoothing * ordinary
    eligible = ordinary[ids]
    n = int(eligible.sum())
    if n == 0:
        raise ValueError("no ordinary token in the batch: nothing could be masked")
    drawn = torch.multinomial(weight[ids.flatten()], math.ceil(prop * n), generator=generator)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked.view(-1)[drawn] = True
    fate = torch.rand(ids.shape, generator=generator, device=ids.device)
    others = ordinary.nonzero()[:, 0]
    at = torch.randint(len(others), ids.shape, generator=generator, device=ids.device)
    new = torch.where(masked & (fate < 0.8), mask_id, ids)
    return torch.where(masked & (fate >= 0.9), others[at], new), masked


def retokenize_embeddings(model: nn.Module, old: Any, new: Any) -> nn.Module:
    """`model`, changed in place, with input embeddings for the tokenizer `new` in place of `old`.

    Each new row is the old row of the same token, else the mean of the rows of the tokens into
    which `old` splits the same string. The output head is tied to them where it was before, else
    made the same way, a bias too. It needs a short training on masked text before it teaches.
    `old` and `new`: `transformers` tokenizers.
    Raises ValueError for a model without input embeddings.

    Defaults: ours; the paper does not say how its vocabularies met.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast
        >>> from stillhouse.methods.language import retokenize_embeddings
        >>> special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        >>> old, new = (
        ...     BertTokenizerFast(vocab={name: i for i, name in enumerate(special + words)})
        ...     for words in (["still", "##house"], ["stillhouse"])
        ... )
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> model = BertForMaskedLM(BertConfig(vocab_size=len(old), **sizes))
        >>> before = model.get_input_embeddings().weight.detach().clone()
        >>> after = retokenize_embeddings(model, old, new).get_input_embeddings().weight
        >>> bool((after[5] == (before[5] + before[6]) / 2).all())
        True
    """
    table = getattr(model, "get_input_embeddings", lambda: None)()
    if table is None:
        raise ValueError(f"{type(model).__name__} has no input embeddings")
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    known, parts = old.get_vocab(), []
    unknown = old.unk_token_id or 0
    for name in new.convert_ids_to_tokens(range(len(new))):
        # The same entry first: a piece that continues a word is no text of its own.
        pieces = [known[name]] if name in known else _pieces(name, old, new)
        parts.append(pieces or [unknown])

    def rows(weight: Tensor) -> Tensor:
        return torch.stack([weight[pieces].mean(0) for pieces in parts])

    with torch.no_grad():
        inputs = rows(table.weight)
        outputs = None if head is None or tied else rows(head.weight)
        bias = getattr(head, "bias", None)
        bias = None if bias is None else rows(bias)
        model.resize_token_embeddings(len(new), mean_resizing=False)
        model.get_input_embeddings().weight.copy_(inputs)
        head = model.get_output_embeddings()
        if outputs is not None:
            head.weight.copy_(outputs)
        if bias is not None:
            head.bias.copy_(bias)
    return model


def _pieces(name: str, old: Any, new: Any) -> list[int]:
    """What `old` makes of the string of a token of `new`."""
    string = new.convert_tokens_to_string([name]).removeprefix("##")
    return old(string, add_special_tokens=False)["input_ids"]
