"""Residual quantization at its edges: no row, one code, rows that do not count, what is refused."""

import warnings

import pytest
import torch

from stillhouse import ops
from stillhouse.ops.random import philox_words


def problem(n, d, k, q):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator), torch.randn(q, k, d, generator=generator)


def maps(bias=True):
    """Into a space of 2 numbers and out of it, of rows of 4 in 2 stages."""
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 2, 4), (2, 2), (2, 4, 2), (2, 4)
    parts = [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]
    return (parts[0], parts[1] if bias else None), (parts[2], parts[3] if bias else None)


def test_no_rows():
    _, tables = problem(1, 4, 6, 2)
    x, table = torch.zeros(3, 0, 4, requires_grad=True), tables.clone().requires_grad_()
    found = ops.rvq(x, table)
    (found.out.sum() + found.error.sum()).backward()
    assert found.codes.shape == (3, 0, 2)
    assert x.grad.shape == x.shape
    assert not table.grad.any()
    assert ops.rvq_decode(found.codes, tables).shape == x.shape
    assert not ops.rvq_statistics(x, found.codes, tables)[0].any()
    for options in (dict(beam=3), dict(temperature=1.0, seed=0), dict(return_margin=True)):
        codes = ops.rvq_encode(x, tables, **options)
        codes = codes[0] if isinstance(codes, tuple) else codes
        assert codes.shape == (3, 0, 2)


def test_no_rows_in_narrow_spaces():
    x, tables = torch.zeros(0, 4, requires_grad=True), problem(1, 2, 6, 2)[1].requires_grad_()
    into, out_of = maps()
    found = ops.projected_rvq(x, tables, into, out_of)
    (found.out.sum() + found.error.sum()).backward()
    assert x.grad.shape == x.shape
    for each in (tables, *into, *out_of):
        assert not each.grad.any()


@pytest.mark.parametrize("grad", ["ste", "rotation", "rotation_per_stage", "stage_sum", "encodec"])
def test_rows_without_a_stage_have_no_gradient(grad):
    x, tables = problem(6, 4, 6, 2)
    there = torch.arange(6) % 3 > 0
    for options in (dict(mask=there), dict(num_quantizers=2 * there)):
        row = x.clone().requires_grad_()
        ops.rvq(row, tables, grad=grad, **options).out.sum().backward()
        assert (row.grad[~there] == 0).all()
        alone = x[there].clone().requires_grad_()
        ops.rvq(alone, tables, grad=grad).out.sum().backward()
        assert torch.equal(row.grad[there], alone.grad)


def test_padding_that_is_nan_does_not_reach_the_maps():
    x, tables = problem(6, 4, 6, 2)[0], problem(1, 2, 6, 2)[1]
    mask = torch.arange(6) < 4
    gradients = []
    for rows in (x[:4], torch.where(mask[:, None], x, torch.nan)):
        into, out_of = maps()
        found = ops.projected_rvq(rows, tables, into, out_of, mask=mask[: len(rows)])
        (found.out.square().sum() + found.error.sum()).backward()
        gradients.append([each.grad for each in (*into, *out_of)])
    for alone, padded in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, alone)


def test_second_derivatives_of_errors_are_refused():
    x, tables = problem(5, 4, 6, 2)
    row = x.clone().requires_grad_()
    found = ops.rvq(row, tables)
    (passed,) = torch.autograd.grad(found.out.pow(3).sum(), row, create_graph=True)
    passed.sum().backward()  # straight through, as often as one likes
    torch.testing.assert_close(row.grad, 6 * found.out.detach())
    error = ops.rvq(row, tables).error.sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (slope,) = torch.autograd.grad(error.square(), row, create_graph=True)
        with pytest.raises(RuntimeError, match="have no second derivative"):
            slope.sum().backward()


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1])
def test_seeds_of_64_bits(seed):
    x, tables = problem(5, 4, 6, 2)
    codes = ops.rvq_encode(x, tables, temperature=1.0, seed=seed)
    assert torch.equal(codes, ops.rvq_encode(x, tables, temperature=1.0, seed=seed - 2**64))
    words = philox_words(seed, position=seed)
    assert torch.equal(words, philox_words(seed - 2**64, position=seed - 2**64))


X, TABLES = problem(5, 4, 6, 2)
CODES = torch.zeros(5, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.rvq_encode(X[:, :3], TABLES), ValueError, r"x must be \[..., 4\]"),
        (lambda: ops.rvq_encode(X, TABLES[0]), ValueError, r"codebooks must be \[Q, K, D\]"),
        (lambda: ops.rvq_encode(X, TABLES[:, :0]), ValueError, "have no code"),
        (lambda: ops.rvq_encode(X.double(), TABLES), TypeError, "float64 goes with itself"),
        (lambda: ops.rvq_encode(X.long(), TABLES), TypeError, "x must be a float tensor"),
        (
            lambda: ops.rvq_encode(X, TABLES, num_quantizers=3),
            ValueError,
            "num_quantizers must be from 1 to 2, the number of codebooks, got 3",
        ),
        (lambda: ops.rvq_encode(X, TABLES, num_quantizers=0), ValueError, "from 1 to 2"),
        (lambda: ops.rvq_encode(X, TABLES, metric="dot"), ValueError, "metric must be one of"),
        (lambda: ops.rvq(X, TABLES, grad="none"), ValueError, "grad must be one of ste"),
        (lambda: ops.rvq(X, TABLES, mask=torch.ones(5)), TypeError, "mask must be bool"),
        (
            lambda: ops.rvq(X, TABLES, mask=torch.ones(4, dtype=torch.bool)),
            ValueError,
            "mask must have the rows' shape",
        ),
        (
            lambda: ops.rvq_encode(X, TABLES, sizes=torch.tensor([1])),
            ValueError,
            "sizes must be one for each table",
        ),
        (
            lambda: ops.rvq_encode(X, TABLES, packed=ops.rvq_pack(TABLES[:1])),
            ValueError,
            "packed was made of tables of another shape",
        ),
        (
            lambda: ops.rvq_decode(torch.zeros(5, 3, dtype=torch.int64), TABLES),
            ValueError,
            "3 stages of codes and 2 codebooks",
        ),
        (
            lambda: ops.rvq_decode(torch.full((5, 2), 6), TABLES),
            RuntimeError,
            "code 6 of a table of 6",
        ),
        (
            lambda: ops.rvq_statistics(X, CODES[:4], TABLES),
            ValueError,
            "codes of",
        ),
        (
            lambda: ops.rvq_encode(X, TABLES, num_quantizers=torch.tensor([0, 1, 2, 3, 2])),
            ValueError,
            "num_quantizers must be from 0 to 2, got 0 to 3",
        ),
        (
            lambda: ops.rvq_encode(X, TABLES, num_quantizers=torch.tensor(-1)),
            ValueError,
            "num_quantizers must be from 0 to 2, got -1",
        ),
        (
            lambda: ops.rvq_encode(X, TABLES, num_quantizers=torch.ones(5)),
            TypeError,
            "num_quantizers must be an int",
        ),
        (lambda: ops.rvq_encode(X, TABLES, num_quantizers=1.5), TypeError, "float"),
        (
            lambda: ops.rvq(X, TABLES, codes=CODES, num_quantizers=1),
            ValueError,
            "leave num_quantizers",
        ),
        (lambda: ops.rvq(X, TABLES, codes=CODES + 0.5), TypeError, "codes must be int64"),
        (lambda: ops.rvq_decode(CODES + 0.5, TABLES), TypeError, "codes must be int64"),
        (lambda: ops.rvq_decode(CODES[:, :0], TABLES), ValueError, "0 stages of codes"),
        (
            lambda: ops.rvq_statistics(X, CODES, TABLES, mask=torch.ones(5)),
            TypeError,
            "mask must be bool",
        ),
        (
            lambda: ops.rvq_encode(X, TABLES, sizes=torch.tensor([6, 7])),
            ValueError,
            "sizes must be from 1 to 6, got 6 to 7",
        ),
        (
            lambda: ops.rvq_encode(X, TABLES, sizes=torch.tensor([0, 6])),
            ValueError,
            "sizes must be from 1 to 6, got 0 to 6",
        ),
        (lambda: ops.rvq_encode(X, TABLES, sizes=[6, 6]), TypeError, "sizes must be int64"),
        (
            lambda: ops.rvq_encode(X, TABLES, temperature=torch.inf, seed=0),
            ValueError,
            "temperature must be a number",
        ),
        (
            lambda: ops.rvq_encode(X, TABLES, temperature=torch.nan, seed=0),
            ValueError,
            "temperature must be a number",
        ),
        (
            lambda: ops.rvq_encode(X, TABLES, temperature=1e-320, seed=0),
            ValueError,
            "temperature must be a number",
        ),
        (lambda: ops.rvq_encode(X, TABLES, beam=2.5), TypeError, "float"),
        (lambda: ops.rvq_encode(X, TABLES.long()), TypeError, "codebooks must be float tensors"),
        (
            lambda: ops.rvq_encode(X, TABLES, packed=ops.rvq_pack(TABLES.double())),
            ValueError,
            "packed was made of tables of another shape, dtype",
        ),
        (
            lambda: ops.projected_rvq(
                X, TABLES[..., :2], (torch.ones(2, 2, 4).half(), None), (torch.ones(2, 4, 2), None)
            ),
            TypeError,
            "into must be torch.float32",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
