"""Rows of a sparse teacher as bytes: ids in as few bits as they need, log-probabilities in 8 to 32.

Everything is little-endian. What a row costs beside them is in `shard_format.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Ways to store log-probabilities, by the dtype of an element as safetensors calls it.
VALUES = {"exact": "F32", "fp16": "F16", "bf16": "BF16", "compact": "U8"}
BITS = {"exact": 32, "fp16": 16, "bf16": 16, "compact": 8}
# Eight ids of so many bits begin within 7 bits of a byte and end within four bytes.
MOST_BITS = 25
_STEPS = 255  # of a compact value: codes 0 to 255


def id_bits(vocab_size: int) -> int:
    """Bits of an id: of 0 to V - 1, and V for "no column".

    Raises ValueError for a vocabulary beyond 2^25 - 1.
    """
    bits = int(vocab_size).bit_length()
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"vocab_size must lie in [1, {2**MOST_BITS - 1}], got {vocab_size}")
    return bits


def id_bytes(k: int, vocab_size: int) -> int:
    """Bytes of a row's k ids."""
    return -(-k * id_bits(vocab_size) // 8)


def pack_ids(ids: Tensor, vocab_size: int) -> np.ndarray:
    """int [n, k], -1 for no column -> uint8 [n, id_bytes]: id j takes the bits from j * id_bits
    on, the lowest first."""
    bits, array = id_bits(vocab_size), ids.cpu().numpy().astype(np.int64)
    array = np.where(array < 0, vocab_size, array).astype("<u4")
    n, k = array.shape
    if bits == 16:
        return array.astype("<u2").reshape(-1).view(np.uint8).reshape(n, 2 * k)
    each = (array[:, :, None] >> np.arange(bits, dtype=np.uint32)) & 1
    return np.packbits(each.astype(np.uint8).reshape(n, k * bits), axis=1, bitorder="little")


def unpack_ids(packed: np.ndarray, k: int, vocab_size: int) -> tuple[Tensor, bool]:
    """The way back: int32 [n, k], and whether some are -1. Raises ValueError for an id above the
    vocabulary's size."""
    bits, n = id_bits(vocab_size), len(packed)
    ids = np.empty((n, k), dtype=np.int32)
    if bits == 16:
        ids[:] = packed.reshape(-1).view("<u2").reshape(n, k)
    else:
        width = packed.shape[1]
        # The last id may be read with bytes that no longer belong to it.
        buffer = np.zeros(n * width + 4, dtype=np.uint8)
        buffer[: n * width] = packed.reshape(-1)
        for j in range(min(k, 8) if n else 0):
            # Every eighth id begins at the same bit of a byte, `bits` bytes after the one before.
            count = -(-(k - j) // 8)
            words = np.ndarray(
                (n, count), "<u4", buffer, offset=(j * bits) >> 3, strides=(width, bits)
            )
            ids[:, j::8] = (words >> np.uint32((j * bits) & 7)) & np.uint32((1 << bits) - 1)
    largest = int(ids.max()) if n else 0
    if largest > vocab_size:
        raise ValueError(f"an id is {largest}, the vocabulary has {vocab_size} columns")
    found = torch.from_numpy(ids)
    if largest == vocab_size:  # it costs as much as all of the above
        found.masked_fill_(found == vocab_size, -1)
    return found, largest == vocab_size


def pack_values(log_probs: Tensor, values: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, k], -inf for no column -> what the shard holds [n, k], and `scale` float32
    [n, 2] of a compact row, else [n, 0].

    Compact: a row from its largest value `top` down to `top - range` in 256 steps that grow
    linearly, value = top - range (code / 255)^2. What comes back is off by at most
    `compact_error(code, range)`: less than three thousandths of the range for the half of it
    nearest the top, where the mass is.
    """
    x = log_probs.detach().float().cpu()
    none = x == -torch.inf
    scale = np.zeros((len(x), 0), dtype=np.float32)
    if values == "compact":
        top = x.amax(-1, keepdim=True)
        top = torch.where(top > -torch.inf, top, 0)
        least = torch.where(none, top, x).amin(-1, keepdim=True)
        spread = top - least
        share = ((top - x) / spread.clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)
        codes = torch.where(none, 0, (share.sqrt() * _STEPS).round())
        return codes.to(torch.uint8).numpy(), torch.cat([top, spread], -1).numpy()
    x = torch.where(none, 0, x)
    if values == "exact":
        return x.numpy(), scale
    if values == "fp16":
        return x.clamp(min=torch.finfo(torch.float16).min).half().numpy(), scale
    return x.bfloat16().view(torch.int16).numpy(), scale


def unpack_values(stored: np.ndarray, scale: np.ndarray, values: str) -> Tensor:
    """The way back, float32 [n, k], with anything where there is no column."""
    if values == "compact":
        top, spread = torch.from_numpy(scale).split(1, -1)
        codes = torch.from_numpy(stored).float()
        return codes.square_().mul_(spread * (-1 / _STEPS**2)).add_(top)
    if values == "bf16":
        return torch.from_numpy(stored).view(torch.bfloat16).float()
    return torch.from_numpy(stored).float()


def compact_error(code: Tensor | int, spread: Tensor | float) -> Tensor | float:
    """How far a compact value of this code can be from what was stored, in nats: half a step of
    code / 255 on either side."""
    return spread * (code + 0.25) / _STEPS**2
