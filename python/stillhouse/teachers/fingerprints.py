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

_NO_CONTENT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def of_tokenizer(tokenizer: Any) -> str:
    """Of its vocabulary, and of the ids it gives a probe: what makes column j mean token j."""
    known = [sorted(tokenizer.get_vocab().items()), list(tokenizer(PROBE)["input_ids"])]
    return hashlib.sha256(json.dumps(known, ensure_ascii=True).encode()).hexdigest()


def of_model(model: nn.Module) -> str:
    """Of its class, and of the names, dtypes, shapes and bytes of its parameters and buffers; of
    its configuration, where it has one, in the place of buffers that a checkpoint does not hold:
    tables of sines are not the same in every last bit on every processor."""
    digest = hashlib.sha256(type(model).__name__.encode())
    tensors, config = dict(model.state_dict()), getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        # Where it was loaded from and by which version is not what it computes.
        known = {n: value for n, value in config.to_dict().items() if n not in _NO_CONTENT}
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    else:
        tensors |= dict(model.named_buffers())
    for name, tensor in sorted(tensors.items()):
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
