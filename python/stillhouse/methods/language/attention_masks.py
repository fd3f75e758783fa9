"""Who may attend to whom: within a prefix, and within packed documents."""

import torch
from torch import Tensor


def prefix_lm_mask(lengths: Tensor, prefix: Tensor, total: int) -> Tensor:
    """Who may attend to whom, bool [B, 1, total, total], True = may: j <= i, or j in the prefix.

    lengths, prefix: int64 [B], tokens of each sequence and how many of them are the prefix (0 =
    causal). Columns from `lengths` on are padding. For `attention_mask` of a `transformers` model,
    with prefixes as `collate` hands them on. A cache cannot be kept: what is put behind a prefix
    changes nothing in it, what is put into it changes all of its states.
    Raises ValueError for 1 <= length <= total or 0 <= prefix <= length not so.

    Defaults: none; the paper's models are causal.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import prefix_lm_mask
        >>> prefix_lm_mask(torch.tensor([5]), torch.tensor([3]), 5)[0, 0].int()
        tensor([[1, 1, 1, 0, 0],
                [1, 1, 1, 0, 0],
                [1, 1, 1, 0, 0],
                [1, 1, 1, 1, 0],
                [1, 1, 1, 1, 1]], dtype=torch.int32)
    """
    if not ((lengths >= 1) & (lengths <= total)).all():
        raise ValueError(f"lengths must lie in [1, {total}], got {lengths.tolist()}")
    if prefix.shape != lengths.shape or not ((prefix >= 0) & (prefix <= lengths)).all():
        raise ValueError(f"prefixes {prefix.tolist()} are not within {lengths.tolist()} tokens")
    at = torch.arange(total, device=lengths.device)
    allowed = (at <= at[:, None]) | (at < prefix[:, None, None])
    return (allowed & (at < lengths[:, None, None]))[:, None]


def document_mask(document_ids: Tensor) -> Tensor:
    """Causal attention within documents, bool [B, 1, T, T], True = may attend.

    document_ids: int64 [B, T] as `collate` gives them; padding (-1) sees padding only.
    Raises ValueError for another number of dimensions.

    Defaults: none; whether the paper's models see across packed documents is not said.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import document_mask
        >>> document_mask(torch.tensor([[0, 0, 1]]))[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    if document_ids.dim() != 2:
        raise ValueError(f"document_ids must be [B, T], got {tuple(document_ids.shape)}")
    same = document_ids[:, None, :] == document_ids[:, :, None]
    return same.tril()[:, None]
