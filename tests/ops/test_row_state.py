"""States of parts of a vocabulary against float64 torch on whole rows."""

import pytest
import torch

from stillhouse import ops
from stillhouse.ops import divergence_autograd

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def rows(dtype=torch.float64, width=5003):
    z = (torch.randn(6, width, dtype=torch.float64) * 3).to(dtype)
    t = (z.double() + torch.randn(6, width, dtype=torch.float64)).to(dtype)
    return z, t


def check(state, z, t, rtol=1e-6):
    """Against the definitions."""
    z, t = z.double(), t.double()
    lq, lp = z.log_softmax(-1), t.log_softmax(-1)
    want = {
        "student_lse": z.logsumexp(-1),
        "teacher_lse": t.logsumexp(-1),
        "forward_kl": (lp.exp() * (lp - lq)).nansum(-1),
        "reverse_kl": (lq.exp() * (lq - lp)).nansum(-1),
    }
    for name, value in want.items():
        torch.testing.assert_close(getattr(state, name), value, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 31, 2048, 5003])
def test_whole_rows(dtype, width, level):
    z, t = rows(dtype, width)
    state = ops.row_state(z, t)
    assert all(x.dtype == torch.float64 and x.shape == (6,) for x in state)
    check(state, z, t, 1e-11 if dtype == torch.float64 else 3e-6)


@pytest.mark.parametrize("cuts", [(2500,), (1, 2, 4999), (700, 1400, 2100, 2800, 3500, 4200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parts_merge_in_any_order(cuts, dtype, level):
    z, t = rows(dtype)
    parts = list(zip(z.tensor_split(cuts, -1), t.tensor_split(cuts, -1), strict=True))
    states = [ops.row_state(*part) for part in parts]
    precise = 1e-11 if dtype == torch.float64 else 3e-6
    check(ops.merge_row_states(*states), z, t, precise)
    check(ops.merge_row_states(*states[::-1]), z, t, precise)
    pairwise = states[0]
    for state in states[1:]:
        pairwise = ops.merge_row_states(pairwise, state)
    check(pairwise, z, t, precise)
    # As they cross a network.
    sent = [ops.RowState(*torch.stack(state)) for state in states]
    assert torch.equal(
        torch.stack(ops.merge_row_states(*sent)), torch.stack(ops.merge_row_states(*states))
    )


@pytest.mark.parametrize("offset", [0.0, 3e4])
def test_an_offset_costs_no_digits(offset, level):
    z, t = rows()
    z, t = (z + offset).float(), (t + offset).float()
    z[:, 4000] += 500.0  # a later block that exceeds everything before
    states = [ops.row_state(z[:, part], t[:, part]) for part in (slice(0, 3000), slice(3000, None))]
    check(ops.merge_row_states(*states), z, t)


def test_arguments(level):
    z, t = rows(torch.float32)
    state = ops.row_state(
        z, t, temperature=2.0, teacher_temperature=1.5, logit_softcap=(4.0, None), logit_scale=0.5
    )
    capped = 4 * torch.tanh(0.5 * z.double() / 4)
    check(state, capped / 2.0, 0.5 * t.double() / 1.5)


def test_parts_without_mass_change_nothing(level):
    z, t = rows(torch.float32)
    z[:, :3000], t[:, :3000] = -torch.inf, -torch.inf
    nothing, rest = ops.row_state(z[:, :3000], t[:, :3000]), ops.row_state(z[:, 3000:], t[:, 3000:])
    assert nothing.student_max.eq(-torch.inf).all()
    check(ops.merge_row_states(nothing, rest), z[:, 3000:], t[:, 3000:])
    check(ops.row_state(z, t), z[:, 3000:], t[:, 3000:])
    mask = torch.tensor([True, False, True, True, False, True])
    masked = ops.row_state(z, t, mask=mask)
    assert masked.student_sum[~mask].eq(0).all()
    assert masked.teacher_max[~mask].eq(-torch.inf).all()
    merged = ops.merge_row_states(masked, rest)
    torch.testing.assert_close(merged.forward_kl, rest.forward_kl, rtol=1e-6, atol=1e-6)


def test_columns_that_only_one_side_has(level):
    z, t = (x[:, :50].float() for x in rows())
    t[:, 7] = -torch.inf  # the student's alone: reverse KL is infinite
    parts = [ops.row_state(z[:, part], t[:, part]) for part in (slice(0, 8), slice(8, None))]
    for state in (ops.row_state(z, t), ops.merge_row_states(*parts)):
        assert state.reverse_kl.eq(torch.inf).all()
        torch.testing.assert_close(
            state.forward_kl, ops.divergence(z, t).double(), rtol=1e-5, atol=1e-6
        )


def test_one_side(level):
    z, _ = rows(torch.float32)
    state = ops.merge_row_states(*(ops.row_state(part) for part in z.tensor_split(3, -1)))
    torch.testing.assert_close(state.student_lse, z.double().logsumexp(-1), rtol=1e-7, atol=1e-6)
    assert state.teacher_lse.eq(-torch.inf).all()


def test_nan_stays_in_its_row(level):
    z, t = rows(torch.float32, 300)
    z[2, 5] = torch.nan
    state = ops.merge_row_states(ops.row_state(z, t), ops.row_state(t, z))
    assert state.student_lse.isnan().tolist() == [i == 2 for i in range(6)]


def test_nan_is_not_lost_in_a_part_of_its_own(level):
    z, t = rows(torch.float32, 5003)
    z[2, :2500] = torch.nan
    parts = [ops.row_state(z[:, part], t[:, part]) for part in (slice(0, 2500), slice(2500, None))]
    for state in (ops.row_state(z, t), ops.merge_row_states(*parts)):
        assert state.student_lse.isnan().tolist() == [i == 2 for i in range(6)]
        assert state.forward_kl.isnan().tolist() == [i == 2 for i in range(6)]


def test_a_device_without_the_kernel(monkeypatch):
    z, t = rows(torch.float32, 60)
    z[:, 3], t[:, 3:5] = -torch.inf, -torch.inf
    arguments = dict(temperature=2.0, logit_softcap=(4.0, None), mask=torch.arange(6) != 1)
    want = ops.row_state(z, t, **arguments), ops.row_state(z)
    monkeypatch.setattr(divergence_autograd, "devices", set())
    with pytest.warns(UserWarning, match="no divergence kernel for cpu"):
        got = ops.row_state(z, t, **arguments), ops.row_state(z)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(tuple(a), tuple(b), rtol=1e-5, atol=1e-5)


def test_leading_dimensions_and_empty_batches(level):
    z, t = (x.view(2, 3, -1) for x in rows(torch.float32, 60))
    assert ops.row_state(z, t).forward_kl.shape == (2, 3)
    assert ops.row_state(z[:0], t[:0]).forward_kl.shape == (0, 3)


def test_opcheck_and_compile(kernels):
    numbers = [1.3, 0.7, 1, 1, 0, 0, 0, 0, 0, 0, 1]
    numbers = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    z, t = rows(torch.float32, 60)
    op = divergence_autograd.kernels().row_state.default
    torch.library.opcheck(op, (z, t, numbers, torch.rand(6) > 0.5))
    torch.library.opcheck(op, (z, None, numbers, None))
    step = torch.compile(lambda z, t: ops.row_state(z, t).forward_kl, fullgraph=True)
    torch.testing.assert_close(step(z, t), ops.row_state(z, t).forward_kl)


def test_errors():
    z, t = rows(torch.float32, 60)
    with pytest.raises(ValueError, match="at least one state"):
        ops.merge_row_states()
    with pytest.raises(ValueError, match=r"different rows do not merge, got \[\(5,\), \(6,\)\]"):
        ops.merge_row_states(ops.row_state(z, t), ops.row_state(z[:5], t[:5]))
    with pytest.raises(ValueError, match="a part has the same columns of both"):
        ops.row_state(z, t[:, :50])
    with pytest.raises(TypeError, match="takes the teacher's logits"):
        ops.row_state(z, ops.SparseTeacher.from_logits(t, k=3))
    with pytest.raises(ValueError, match="mask must be"):
        ops.row_state(z, t, mask=torch.ones(5) > 0)
