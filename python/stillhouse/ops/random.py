"""Random numbers that depend on where they are used: the same in any batch and on any device."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
# Streams of a place, each for one purpose.
ACCEPT, FINAL, DRAFTING = range(3)


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


def philox_uniform(seed: int | Tensor, position, node=0, stream=0) -> Tensor:
    """One number of 53 bits in (0, 1), float64: u = (w + 1/2) 2^-53, w from two words of the place.

    Arguments as in `philox_words`. float64 rounds the largest w's u to 1, once in 2^53.

    Example:
        >>> from stillhouse.ops.random import philox_uniform
        >>> philox_uniform(seed=0, position=0).item()
        0.39904647084896455
    """
    words = philox_words(seed, position, node, stream)
    return ((words[..., 0] << 21 | words[..., 1] >> 11).double() + 0.5) * 2.0**-53


def sample_categorical(
    logits: Tensor,
    *,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    position: int | Tensor | None = None,
) -> Tensor:
    """A sample of each row's softmax, int64 [...], by its inverse distribution function in float64.

    logits: float [..., V]; -inf is never drawn. The uniform number comes from `generator`, or from
    `seed` and `position` (ints, or int64 that broadcast to [...]; the row's number if None): node
    0, stream 1, so that `tree_verify` of a root alone draws the same token at the same place.

    Raises ValueError for both or none of the two sources, a position without a seed and, on the
    CPU, rows with NaN, +inf or nothing above -inf (elsewhere their sample is -1); TypeError for
    logits that are not floats.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> ops.sample_categorical(torch.tensor([[0.0, 1.0], [2.0, -torch.inf]]), seed=3)
        tensor([0, 0])
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits must be a float tensor, got {getattr(logits, 'dtype', logits)}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V >= 1, got {tuple(logits.shape)}")
    if (generator is None) == (seed is None):
        raise ValueError("a sample needs a generator or a seed, and not both")
    if seed is None and position is not None:
        raise ValueError("a position is for a seed: a generator has its own state")
    rows = logits.shape[:-1]
    if seed is None:
        u = torch.rand(rows, generator=generator, device=logits.device, dtype=torch.float64)
    else:
        if position is None:
            position = torch.arange(rows.numel(), device=logits.device).view(rows)
        u = philox_uniform(seed, position, 0, FINAL).to(logits.device)
        try:
            u = u.expand(rows)
        except RuntimeError:
            raise ValueError(
                f"seed and position must broadcast to the rows {tuple(rows)}, got {tuple(u.shape)}"
            ) from None
    top = logits.amax(-1, keepdim=True)
    fit = top.isfinite()[..., 0]  # amax hands NaN on
    if logits.is_cpu and not torch.compiler.is_compiling() and not fit.all():
        raise ValueError("logits have a row with NaN, +inf or nothing above -inf")
    cumulated = (logits.double() - top.double()).exp().cumsum(-1)
    # Rounding may put u at the very end: then it is the last token with any mass.
    u = torch.minimum(u[..., None] * cumulated[..., -1:], cumulated[..., -1:])
    last = logits.shape[-1] - 1 - (logits > -torch.inf).flip(-1).int().argmax(-1, keepdim=True)
    token = torch.minimum((cumulated <= u).sum(-1, keepdim=True), last)[..., 0]
    return torch.where(fit, token, -1)
