"""Ids and log-probabilities in few bits: what comes back, and what it cost."""

import numpy as np
import pytest
import torch

from stillhouse.teachers import packing


@pytest.mark.parametrize("vocab_size", [1, 3, 255, 256, 49152, 65535, 65536, 151936, 2**25 - 1])
@pytest.mark.parametrize("k", [1, 7, 8, 9, 64])
def test_ids_come_back(vocab_size, k):
    generator = torch.Generator().manual_seed(k)
    ids = torch.randint(-1, vocab_size, (13, k), generator=generator, dtype=torch.int32)
    ids[0], ids[1] = -1, vocab_size - 1
    packed = packing.pack_ids(ids, vocab_size)
    assert packed.dtype == np.uint8
    assert packed.shape == (13, packing.id_bytes(k, vocab_size))
    got, some_are_none = packing.unpack_ids(packed, k, vocab_size)
    assert torch.equal(got, ids)
    assert some_are_none
    # As one number, of which id j has the bits from j * bits on.
    bits = packing.id_bits(vocab_size)
    for row, given in zip(packed, ids.tolist(), strict=True):
        number = sum((vocab_size if x < 0 else x) << (j * bits) for j, x in enumerate(given))
        assert int.from_bytes(row.tobytes(), "little") == number


def test_an_id_beyond_the_vocabulary_is_noticed():
    packed = packing.pack_ids(torch.tensor([[5, 6]]), 7)
    packed[:] = 0xFF
    with pytest.raises(ValueError, match="an id is 7, the vocabulary has 4 columns"):
        packing.unpack_ids(packed, 2, 4)
    with pytest.raises(ValueError, match="vocab_size must lie in"):
        packing.id_bits(2**25)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [("exact", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_values_are_rounded_once(values, dtype):
    x = -30 * torch.rand(50, 6)
    stored, scale = packing.pack_values(x, values)
    assert scale.shape == (50, 0)
    assert torch.equal(packing.unpack_values(stored, scale, values), x.to(dtype).float())


def test_the_bound_of_compact_values_holds_and_is_tight():
    generator = torch.Generator().manual_seed(0)
    spread = 10 ** (4 * torch.rand(400, 1, generator=generator) - 3)
    x = -(spread * torch.rand(400, 64, generator=generator))
    x[0], x[1, 1:], x[2] = -0.5, -torch.inf, -1e-30  # no range, one column, next to nothing
    stored, scale = packing.pack_values(x, "compact")
    assert stored.dtype == np.uint8
    got = packing.unpack_values(stored, scale, "compact")
    there = x > -torch.inf
    error = (got.double() - x.double()).abs()[there]
    codes = torch.from_numpy(stored).double()
    bound = packing.compact_error(codes, torch.from_numpy(scale)[:, 1:].double())
    bound = bound.expand_as(codes)[there] + 2e-7 * x[there].abs().double()  # float32's own
    assert bool((error <= bound).all())
    assert float((error / bound).max()) > 0.9
    # The upper half of the range by value has codes up to 180, which are within this of it.
    assert packing.compact_error(180, 1.0) < 0.0028
    assert packing.compact_error(0, 1.0) < 4e-6
