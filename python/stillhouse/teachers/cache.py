"""Tensors that cost a forward pass, kept on disk under what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.teachers.shard_format import partial_path


class TensorCache:
    """Results under a hash of everything that they depend on.

    Args:
        root: the folder, made when something is first stored. Processes may share it: a file is
            written under another name and put in its place whole.

    Example:
        >>> import tempfile, torch
        >>> from stillhouse.teachers import TensorCache
        >>> cache = TensorCache(tempfile.mkdtemp())
        >>> make = lambda: {"features": torch.arange(3)}
        >>> cache.get({"model": "0f3a", "layer": 4}, make)["features"]
        tensor([0, 1, 2])
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def get(
        self, key: Mapping[str, Any], compute: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What `compute()` returned for this key, now or at an earlier time, on the CPU.

        `key` is what the result depends on: strings, numbers, None, lists and dicts of them, and
        tensors, which count by their content. For a model give
        `teachers.fingerprints.of_model(model)`. A file that was damaged is made again.

        Raises TypeError for a key of anything else, and for a result that is no dict of tensors.
        """
        plain = json.dumps(_plain(key, "key"), sort_keys=True)
        path = self._path(plain)
        found = _read(path, plain)
        if found is not None:
            return found
        made = dict(compute())
        for name, tensor in made.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise TypeError(f"a cache holds tensors by name, got {type(tensor).__name__}")
        made = {name: each.detach().cpu().contiguous().clone() for name, each in made.items()}
        _write(path, made, plain)
        return made

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the result of this key is, or would be."""
        return self._path(json.dumps(_plain(key, "key"), sort_keys=True))

    def _path(self, plain: str) -> Path:
        digest = hashlib.sha256(plain.encode()).hexdigest()
        return self.root / digest[:2] / f"{digest}.safetensors"


def _plain(value: Any, where: str) -> Any:
    """As JSON knows it; 1, 1.0 and True stay different things."""
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1).cpu().contiguous().view(torch.uint8)
        digest = hashlib.sha256(flat.numpy().data).hexdigest()
        return {"tensor": [str(value.dtype), list(value.shape), digest]}
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise TypeError(f"{where} has names that are no strings")
        return {"dict": {name: _plain(each, f"{where}.{name}") for name, each in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_plain(each, f"{where}[{i}]") for i, each in enumerate(value)]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(
        f"{where} is {type(value).__name__}: strings, numbers, None, lists, dicts and tensors can "
        "be told apart by their content"
    )


def _read(path: Path, plain: str) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    whole = metadata.get("key") == plain and metadata.get("content") == _content(tensors)
    return tensors if whole else None


def _write(path: Path, tensors: dict[str, Tensor], plain: str) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        save_file(tensors, partial, metadata={"key": plain, "content": _content(tensors)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _content(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(json.dumps(_plain(tensors[name], name)).encode())
    return digest.hexdigest()
