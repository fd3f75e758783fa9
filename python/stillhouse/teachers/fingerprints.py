"""What a tokenizer, a model and examples are, in 64 hexadecimal digits each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from stillhouse.train.models import PROBE


def of_tokenizer(tokenizer: Any) -> str:
    """Of its vocabulary, and of the ids it gives a probe: what makes column j mean token j."""
    known = [sorted(tokenizer.get_vocab().items()), list(tokenizer(PROBE)["input_ids"])]
    return hashlib.sha256(json.dumps(known, ensure_ascii=True).encode()).hexdigest()


def of_model(model: nn.Module) -> str:
    """Of its class, and of the names, dtypes, shapes and bytes of its parameters and buffers."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1).cpu().contiguous()
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def of_examples(examples: Iterable[Any]) -> str:
    """Of the token stream: ids and masks of `train.examples.Example`s, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(example.input_ids, dtype="<i4").data)
        digest.update(np.packbits(example.loss_mask).data)
    return digest.hexdigest()
