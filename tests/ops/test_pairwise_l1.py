"""L1 distances of all pairs of rows."""

import pytest
import torch

from stillhouse import ops

DOUBLE = torch.float64


def assert_near(found, want, tolerance):
    torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, DOUBLE])
@pytest.mark.parametrize(("n", "m", "d"), [(5, 7, 3), (1, 1, 1), (6, 4, 1025), (32, 32, 3000)])
def test_pairwise_l1(n, m, d, dtype, level):
    x, y = torch.randn(2, n, d).to(dtype), torch.randn(2, m, d).to(dtype)
    x[:, 0, : d // 2] = y[:, 0, : d // 2]  # no slope where entries are equal
    given = [each.clone().requires_grad_() for each in (x, y)]
    upstream = torch.randn(2, n, m, dtype=DOUBLE if dtype == DOUBLE else torch.float32)
    found = ops.pairwise_l1(*given)
    assert found.dtype == upstream.dtype
    found.backward(upstream)
    difference = x.double()[:, :, None] - y.double()[:, None]
    tolerance = 1e-12 if dtype == DOUBLE else 2e-6
    assert_near(found, difference.abs().sum(-1), tolerance)
    slopes = upstream.double()[..., None] * difference.sign()
    coarse = {DOUBLE: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}.get(dtype, 2e-3)
    assert_near(given[0].grad, slopes.sum(2), coarse)
    assert_near(given[1].grad, -slopes.sum(1), coarse)
    assert torch.equal(ops.pairwise_l1(x[0], y[0]), found[0])


def test_pairwise_l1_bad_input():
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        ops.pairwise_l1(torch.ones(2, 2).long(), torch.ones(2, 2))
    for other in (torch.ones(2, 3), torch.ones(1, 2, 2), torch.ones(2, 2).double()):
        with pytest.raises(ValueError, match="x and y must be"):
            ops.pairwise_l1(torch.ones(2, 2), other)
    assert ops.pairwise_l1(torch.ones(0, 2), torch.ones(3, 2)).shape == (0, 3)
