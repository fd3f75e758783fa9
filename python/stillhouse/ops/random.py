"""Random numbers that depend on where they are used: the same in any batch and on any device."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def philox_words(seed: int | Tensor, position, node=0, stream=0) -> Tensor:
    """Four words of Philox4x32-10 (Salmon et al., SC 2011), int64 [..., 4] in [0, 2^32).

    seed and position are 64 bits wide, node and stream 32: ints, or int64 tensors that broadcast.
    The generator's key is the seed, its counter (low position, high position, node, stream).

    Example:
        >>> from stillhouse.ops.random import philox_words
        >>> [hex(word) for word in philox_words(seed=0, position=0).tolist()]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    given = [
        torch.as_tensor(in_int64(part), dtype=torch.int64)
        for part in (seed, position, node, stream)
    ]
    device = next((part.device for part in given if part.dim() > 0), given[0].device)
    seed, position, node, stream = torch.broadcast_tensors(*(part.to(device) for part in given))
    key = [seed & _LOW, seed >> 32 & _LOW]
    c = [position & _LOW, position >> 32 & _LOW, node & _LOW, stream & _LOW]
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c[0])
        high1, low1 = _product(0xCD9E8D57, c[2])
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [key[0] + 0x9E3779B9 & _LOW, key[1] + 0xBB67AE85 & _LOW]
    return torch.stack(c, -1)


def in_int64(number: int | Tensor) -> int | Tensor:
    """The int64 of the same 64 bits."""
    return (number + 2**63) % 2**64 - 2**63 if isinstance(number, int) else number


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, which int64 holds half by half only."""
    of_low, of_high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (of_low >> 16) + of_high
    return middle >> 16, (middle & 0xFFFF) << 16 | of_low & 0xFFFF


def philox_gumbel(seed: int | Tensor, position, node, size: int) -> Tensor:
    """-log(-log u) for each of `size` numbers of a place, float64 [..., size]: number j has word j
    modulo 4 of stream j // 4, u = (word + 1/2) / 2^32."""
    streams = torch.arange(-(-size // 4))
    position = torch.as_tensor(position)
    words = philox_words(seed, position[..., None], node, streams.to(position.device))
    u = (words.flatten(-2)[..., :size].double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(u))
