"""The compiler vectorises the loops of every kind: one that stays scalar is right, and five to ten
times slower, so only a clock sees it."""

import time

import pytest
import torch

from stillhouse import ops

KINDS = [
    ops.ForwardKL(),
    ops.ReverseKL(),
    ops.JSD(),
    ops.SkewKL(),
    ops.SkewReverseKL(),
    ops.TAID(0.4),
]


def seconds(kinds, z, t, gradient):
    """Best of interleaved rounds for each kind, on one thread and rows that fit in L2."""
    best = [float("inf")] * len(kinds)
    for _ in range(30):
        for i, kind in enumerate(kinds):
            x = z.detach().requires_grad_(gradient)
            start = time.perf_counter()
            ops.divergence_loss(x, t, kind)
            best[i] = min(best[i], time.perf_counter() - start)
    return best


@pytest.mark.skipif(ops.cpu_level() == 0, reason="the ratio is that of the wide levels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
def test_no_kind_is_scalar(dtype, gradient):
    z, t = (torch.randn(4, 32_768) * 3).to(dtype), (torch.randn(4, 32_768) * 3).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    simple, *others = seconds([ops.TVD(), *KINDS], z, t, gradient)
    torch.set_num_threads(threads)
    for kind, took in zip(KINDS, others, strict=True):
        assert took < 3 * simple, (kind, took / simple)
