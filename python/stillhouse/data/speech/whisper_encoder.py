"""Whisper's encoder in torch, from a file of CTranslate2, whose own encoder gives the last layer
alone."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv1d, gelu, layer_norm, linear, scaled_dot_product_attention

FLOAT16 = 4  # CTranslate2's number of the type


class WhisperEncoder:
    """Hidden states of log-mel spectra. path: a model.bin with weights in float16.

    Raises ValueError for a file of another format.
    """

    def __init__(self, path: str | Path):
        self.weights = {
            name.removeprefix("encoder/"): each
            for name, each in _weights(Path(path)).items()
            if name.startswith("encoder/")
        }
        self.layers = sum(name.endswith("linear_1/weight") for name in self.weights) // 2
        self.width = self.weights["layer_norm/gamma"].shape[0]
        self.heads = self.width // 64  # as of every Whisper

    @torch.no_grad()
    def __call__(self, mel: Tensor) -> Tensor:
        """Of [80, 2 T], T <= 1500: [layers + 1, T, width], before the first layer, after each, and
        after the last one its norm."""
        x = gelu(conv1d(mel[None], *self._pair("conv1", "weight", "bias"), padding=1))
        x = gelu(conv1d(x, *self._pair("conv2", "weight", "bias"), stride=2, padding=1))[0].T
        x = x + self.weights["position_encodings/encodings"][: len(x)]
        states = [x]
        for layer in range(self.layers):
            of = f"layer_{layer}/"
            x = x + self._attend(self._norm(x, of + "self_attention/"), of + "self_attention/")
            inner = gelu(self._linear(self._norm(x, of + "ffn/"), of + "ffn/linear_0"))
            x = x + self._linear(inner, of + "ffn/linear_1")
            states.append(x)
        states[-1] = self._norm(x, "")
        return torch.stack(states)

    def _attend(self, x: Tensor, of: str) -> Tensor:
        rows = self._linear(x, of + "linear_0").view(len(x), 3, self.heads, 64)
        query, key, value = rows.permute(1, 2, 0, 3)[:, None].unbind(0)
        found = scaled_dot_product_attention(query, key, value)[0]
        return self._linear(found.transpose(0, 1).flatten(1), of + "linear_1")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, *self._pair(name, "weight", "bias"))

    def _norm(self, x: Tensor, of: str) -> Tensor:
        return layer_norm(x, (self.width,), *self._pair(of + "layer_norm", "gamma", "beta"))

    def _pair(self, name: str, *parts: str) -> list[Tensor]:
        return [self.weights[f"{name}/{part}"] for part in parts]


def _weights(path: Path) -> dict[str, Tensor]:
    """The float16 variables of a file of CTranslate2's version 6 as float32: each is a name, its
    number of dimensions and these, its type, its size in bytes, and the values."""
    content, place = memoryview(path.read_bytes()), 0

    def take(form: str) -> tuple[int, ...]:
        nonlocal place
        place += struct.calcsize(form)
        return struct.unpack_from(form, content, place - struct.calcsize(form))

    def text() -> str:
        (size,) = take("<H")
        return take(f"<{size}s")[0].rstrip(b"\0").decode()

    try:
        (version,), spec = take("<I"), text()
        _, variables = take("<II")
        if (version, spec) != (6, "WhisperSpec"):
            raise ValueError(f"version {version} of {spec}")
        found = {}
        for _ in range(variables):
            name, (dims,) = text(), take("<B")
            shape = take(f"<{dims}I")
            kind, size = take("<BI")
            values, place = content[place : place + size], place + size
            if kind == FLOAT16:
                array = np.frombuffer(values, np.float16).astype(np.float32)
                found[name] = torch.from_numpy(array).view(shape)
    except (struct.error, UnicodeDecodeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not Whisper as CTranslate2 keeps it: {error}") from None
    return found
