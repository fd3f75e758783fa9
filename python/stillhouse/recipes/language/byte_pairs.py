"""A byte-level BPE tokenizer, trained where it is used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def byte_pairs(
    texts: Iterable[str], size: int, *, special: Sequence[str] = (), lowercase: bool = False
) -> Any:
    """A `tokenizers.Tokenizer` of `size` entries; the first ones are `special`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    if lowercase:
        core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return core
