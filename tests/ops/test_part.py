"""Divergences of a part of the columns: with numbers of whole rows, parts add up to these."""

import pytest
import torch

from stillhouse import ops
from stillhouse.ops import divergence_autograd
from stillhouse.ops.divergence_arguments import check_call

# Sums of terms, with slopes whose sum is known and with others.
KINDS = [
    ops.ForwardKL(),
    ops.ReverseKL(),
    ops.JSD(0.3),
    ops.SkewKL(),
    ops.SkewReverseKL(),
    ops.TVD(),
    ops.SoftCrossEntropy(),
    ops.SymmetricKL(0.3),
    ops.Hellinger(),
    ops.Chi2(),
    ops.AlphaBeta(),
    ops.AlphaBeta(0.4, -0.4),
    ops.Amari(0.3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_parts_add_up_to_whole_rows(kind, dtype, level):
    kernels = divergence_autograd.kernels()
    z = (2 * torch.randn(5, 700)).to(dtype)
    t = (z + torch.randn(5, 700)).to(dtype)
    t[1], t[2, :400] = z[1], -torch.inf
    call = check_call(z, t, kind, 1.3, None, None, None, (0.5, 1.0), None, 0.0)
    number, factor = kind.kernel_number, float(call.numbers[-1])
    state = ops.row_state(z, t, temperature=1.3, logit_scale=(0.5, 1.0))
    lse = torch.stack([state.student_lse, state.teacher_lse])
    widths = (1, 128, 60, 511)
    parts = [
        (a, b, kernels.divergence_part(a, b, call.numbers, lse, number))
        for a, b in zip(z.split(widths, -1), t.split(widths, -1), strict=True)
    ]
    value, slope = sum(sums for _, _, sums in parts)
    weight = torch.linspace(-1, 2, 5, dtype=call.result)
    gradient = torch.cat(
        [
            kernels.divergence_part_gradient(a, b, call.numbers, lse, slope, weight, number)
            for a, b, _ in parts
        ],
        -1,
    )
    z.requires_grad_()
    want = ops.divergence(z, t, kind, temperature=1.3, logit_scale=(0.5, 1.0))
    (want * weight).sum().backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-9)
    rtol = min(tolerance, 1e-5)
    torch.testing.assert_close(
        value * factor, want.detach().double(), rtol=rtol, atol=rtol / 10, equal_nan=True
    )
    torch.testing.assert_close(
        gradient.double(), z.grad.double(), rtol=tolerance, atol=tolerance / 10, equal_nan=True
    )


def test_the_ops_and_their_shapes(kernels):
    op = divergence_autograd.kernels()
    z, t = torch.randn(2, 3, 40), torch.randn(2, 3, 40)
    call = check_call(z, t, "jsd", 1.0, None, None, None, 1.0, None, 0.0)
    lse = torch.stack([z.double().logsumexp(-1), t.double().logsumexp(-1)])
    arguments = (z, t, call.numbers, lse)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.divergence_part.default, (*arguments, 3), test_utils=utils)
    weight, slope = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.float64)
    gradient = op.divergence_part_gradient.default
    torch.library.opcheck(gradient, (*arguments, slope, weight, 3), test_utils=utils)
    with pytest.raises(RuntimeError, match="lse must be float64"):
        op.divergence_part(z, t, call.numbers, lse[0], 3)
