"""The largest columns of a row, and what all others have, against a sort in float64."""

import pytest
import torch

from stillhouse import ops


def largest(logits, k, temperature=1.0):
    teacher = ops.SparseTeacher.from_logits(logits, k=k, temperature=temperature)
    return teacher.ids, teacher.log_probs, teacher.log_rest


def plain(logits, k, temperature=1.0):
    """In the order of the values and, where they are equal, of the columns."""
    x = logits.double() / temperature
    order = logits.double().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    log_p = x.log_softmax(-1)
    rest = log_p.scatter(-1, order, -torch.inf).logsumexp(-1)
    return order.int(), log_p.gather(-1, order), rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("columns", [1, 5, 31, 32, 33, 500, 2048, 2049, 5000, 49152])
def test_against_a_sort(dtype, columns, level):
    for k in {1, 2, 8, 64, 700, columns}:
        if k > columns or k == columns > 5000:
            continue
        x = (4 * torch.randn(6, columns)).to(dtype)
        x[0] = 0
        x[1, : columns // 2] = -torch.inf
        x[2, columns // 3] = 60
        x[3] -= 1000 if dtype != torch.float16 else 500
        for temperature in (1.0, 0.7):
            got, want = largest(x, k, temperature), plain(x, k, temperature)
            if level != "cuda":  # where equal logits may come in any order
                assert torch.equal(got[0], want[0])
            tolerance = 1e-12 if dtype == torch.float64 else 2e-6
            for each, other in zip(got[1:], want[1:], strict=True):
                torch.testing.assert_close(
                    each.double(), other, rtol=tolerance, atol=tolerance, equal_nan=True
                )


def test_what_is_left_is_accurate_however_little(level):
    """Not 1 minus the known mass: from 1e-9 to e^-700 of the whole."""
    x = torch.full((6, 3000), -30.0)
    x[:, 100:104] = torch.tensor([3.0, 2.0, 2.5, 1.0])
    x[1, 104:] = -200.0
    x[1, :100] = -200.0
    x[2, :100], x[2, 104:] = -699.0, -701.0
    x[3, 500] = 0.999  # nearly one of them
    x[4, :100], x[4, 104:] = -torch.inf, -torch.inf
    x[5, :100], x[5, 104:] = -torch.inf, -torch.inf
    x[5, 7] = -250.0
    _, _, got = largest(x, 4)
    _, _, want = plain(x, 4)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    assert got[4] == -torch.inf


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_row_says_so(broken, level):
    x = torch.randn(3, 4000)
    x[1, 3000] = broken
    _, log_probs, log_rest = largest(x, 5)
    assert log_probs[1].isnan().any()
    assert log_probs[[0, 2]].isfinite().all()
    assert log_rest[[0, 2]].isfinite().all()
    x[1] = -torch.inf
    assert largest(x, 5)[1][1].isnan().all()


def test_rows_of_any_stride(level):
    x = torch.randn(4, 6, 300)
    for view in (x[:, ::2], x.transpose(0, 1), x[..., :200], x[..., ::3]):
        got, want = largest(view, 7), plain(view, 7)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1].double(), want[1], rtol=1e-6, atol=1e-6)
    empty = largest(x[:0], 7)
    assert [tuple(each.shape) for each in empty] == [(0, 6, 7), (0, 6, 7), (0, 6)]


# A row of 300 columns has 32 maxima, one of 5,000 has 96: with a larger k all are candidates.
@pytest.mark.parametrize(("columns", "k"), [(300, 8), (300, 40), (5000, 8), (5000, 96), (5000, 97)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_have_the_teachers_distribution(columns, k, temperature, level):
    """On average each of the others has its probability: chi-squared over 64,000 draws."""
    logits, rows, draws = 3 * torch.randn(columns), 4000, 16
    x = logits.expand(rows, columns).contiguous()
    teacher = ops.SparseTeacher.from_logits(x, k=k, draws=draws, temperature=temperature)
    assert teacher.ids.shape == (rows, k + draws)
    present = teacher.ids >= 0
    share = teacher.log_probs.double().exp()
    torch.testing.assert_close(share.sum(-1), torch.ones_like(share[:, 0]), rtol=0, atol=1e-6)
    assert (teacher.log_rest == -torch.inf).all()
    found = torch.zeros(columns, dtype=torch.float64)
    found.index_add_(0, teacher.ids[present].long(), share[present])
    want, found = (logits.double() / temperature).softmax(-1), found / rows
    top = want.topk(k).indices
    torch.testing.assert_close(found[top], want[top], rtol=1e-5, atol=1e-7)
    others = torch.ones(columns, dtype=torch.bool).index_fill(0, top, False)
    rest, count = want[others].sum(), rows * draws
    expected, seen = want[others] / rest * count, found[others] / rest * count
    # Columns that are hardly ever drawn count together.
    often = expected >= 5
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    seen = torch.cat([seen[often], seen[~often].sum()[None]])
    chi = float(((seen - expected) ** 2 / expected.clamp(min=1)).sum())
    assert abs(chi - len(expected)) < 5 * (2 * len(expected)) ** 0.5


@pytest.mark.parametrize("columns", [200, 5000])
def test_no_draw_is_left_over(columns, level):
    """The largest number below 1 falls on a column, too, whatever is rounded on the way."""
    if level == "cuda":
        pytest.skip("the kernel is the CPU's")
    x = 3 * torch.randn(500, columns)
    uniform = torch.full((500, 1), 1 - 2.0**-53, dtype=torch.float64)
    for k in (1, 33, 97):
        ids, _, _, drawn = torch.ops.stillhouse.largest(x, k, 1.3, uniform)
        assert drawn.min() >= 0
        assert not (ids == drawn).any()


def test_draws_of_next_to_nothing(level):
    x = torch.full((3, 400), -300.0)
    x[:, 7], x[0, 9], x[1, 300] = 0.0, -2.0, -20.0
    teacher = ops.SparseTeacher.from_logits(x, k=1, draws=5)
    assert teacher.ids[0].tolist() == [7, 9, -1, -1, -1, -1]
    assert teacher.ids[1].tolist() == [7, 300, -1, -1, -1, -1]
    mass = teacher.log_probs.double().exp().sum(-1) + teacher.log_rest.double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-6)
    whole = ops.SparseTeacher.from_logits(torch.randn(4, 6), k=5, draws=8)
    assert whole.ids.shape == (4, 6)
    assert whole.ids.sort(-1).values.tolist() == [[0, 1, 2, 3, 4, 5]] * 4
    with pytest.raises(ValueError, match="draws must be at least 0"):
        ops.SparseTeacher.from_logits(x, k=1, draws=-1)
    with pytest.raises(ValueError, match="come with k alone"):
        ops.SparseTeacher.from_logits(x, p=0.5, draws=1)


def test_the_op_and_its_shapes():
    torch.library.opcheck(torch.ops.stillhouse.largest, (torch.randn(5, 300), 7, 2.0))
    uniform = torch.rand(5, 3, dtype=torch.float64).sort(-1).values
    torch.library.opcheck(torch.ops.stillhouse.largest, (torch.randn(5, 300), 7, 2.0, uniform))
    with pytest.raises(RuntimeError, match=r"k must lie in \[1, 300\], got 301"):
        torch.ops.stillhouse.largest(torch.randn(5, 300), 301, 2.0)
