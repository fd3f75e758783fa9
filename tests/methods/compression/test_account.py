"""What a model costs, against closed forms."""

import pytest
import torch
from torch import nn

from stillhouse.methods.compression import account, freeze_fdb_, quantize_fdb_
from stillhouse.nn import FDBLinear

V, H, F, L = 259, 32, 48, 2  # of the tiny Llama; 4 heads of 8, 2 of them for keys and values
BLOCK = H * H + 2 * H * 16 + H * H + 3 * H * F
NORMS = (2 * L + 1) * H


@pytest.fixture
def ids():
    return torch.arange(10).view(2, 5)


def attention(batch, tokens):
    """Products of all blocks between tokens: scores, and sums of values."""
    return L * 2 * batch * H * tokens * tokens


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_is_its_closed_form(llama, ids, tied):
    model = llama(L, tie_word_embeddings=tied)
    params = L * BLOCK + NORMS + V * H * (1 if tied else 2)
    # A head that is tied multiplies all the same, and an embedding does not.
    one = L * BLOCK + V * H + attention(1, 1)
    assert account(model) == (params, 32.0, 4 * params, one)
    assert account(model.bfloat16()) == (params, 16.0, 2 * params, one)
    assert account(model, {"input_ids": ids}).macs == 10 * (L * BLOCK + V * H) + attention(2, 5)


@pytest.mark.parametrize("group", [8, 16])
def test_two_bits_whether_they_train_or_not(llama, ids, group):
    model = llama(L)
    dense = account(model)
    quantize_fdb_(model, group)
    # Rows of 48 columns take two words of 32 bits.
    columns_48 = 2 * 2 * 4 * H + 2 * 2 * H * (F // group)
    columns_32 = 2 * 4 * (BLOCK // H - F) + 2 * 2 * (BLOCK // H - F) * (H // group)
    size = L * (columns_32 + columns_48) + 4 * (NORMS + 2 * V * H)
    found = account(model)
    assert found == (dense.params, 8 * size / dense.params, size, dense.macs)
    before = model(ids).logits
    freeze_fdb_(model)
    assert account(model) == found
    assert account(model, ids) == found._replace(macs=account(llama(L), ids).macs)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    assert all("forward" not in vars(each) for each in model.modules())


def test_bits_of_a_layer_alone():
    layer = FDBLinear(128, 6, bias=False, group_size=64)
    assert account(layer) == (768, 2.5, 240, None)
    assert account(layer, torch.ones(3, 5, 128)).macs == 15 * 768
    assert account(FDBLinear(128, 6, bias=True, group_size=64)).bytes == 240 + 24


def test_plain_layers():
    assert account(nn.Embedding(10, 4), torch.tensor([1, 2])) == (40, 32.0, 160, 0)
    found = account(nn.Conv1d(3, 5, 2, bias=False), (torch.ones(2, 3, 7),))
    assert found == (30, 32.0, 120, 2 * 6 * 30)
    assert account(nn.BatchNorm1d(4)).params == 8
    assert account(nn.Linear(4, 2).half()) == (10, 16.0, 20, None)


def test_the_model_is_what_it_was(llama):
    model = llama().train()
    account(model)
    assert model.training
    assert all(each.grad is None for each in model.parameters())
    normed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    account(normed, torch.ones(3, 4))
    assert normed.training
    assert normed[1].num_batches_tracked == 0


def test_nothing_to_count():
    with pytest.raises(ValueError, match="ReLU has no weights to count"):
        account(nn.ReLU())
