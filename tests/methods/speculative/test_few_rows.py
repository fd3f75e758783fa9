"""Linear layers that multiply the other way round: the same numbers, and left as they were."""

import pytest
import torch
from torch import nn

from stillhouse.methods.speculative.few_rows import MOST_ROWS, few_rows


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (1, 1, 7), (2, 3, 7), (1, 40, 7), (0, 7)])
def test_products_are_those_of_linear(shape, bias):
    layer, x = nn.Linear(7, 5, bias=bias), torch.randn(shape)
    wanted = layer(x)
    with torch.inference_mode(), few_rows(layer):
        found = layer(x)
    torch.testing.assert_close(found, wanted.detach())
    assert found.is_contiguous()


def test_which_layers_and_rows(monkeypatch):
    class Other(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4).bfloat16(), Other(4, 4)])
    products = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *given: products.append(1) or mm(*given))
    with few_rows(model), few_rows(model):
        for layer in model:
            layer(torch.ones(2, 4, dtype=layer.weight.dtype))
        assert len(products) == 1
        model[0](torch.ones(MOST_ROWS, 4))
        assert len(products) == 2
        model[0](torch.ones(MOST_ROWS + 1, 4))
        model[0](torch.ones(2, 4, requires_grad=True)).sum().backward()
        assert len(products) == 3
    assert all("forward" not in layer.__dict__ for layer in model)
    with pytest.raises(RuntimeError), few_rows(model):
        model[0](torch.ones(2, 3))
    assert "forward" not in model[0].__dict__
