"""Beams against brute force over all sums, draws against the law and the counter's words."""

import itertools

import pytest
import torch

from stillhouse import ops
from stillhouse.ops import rvq_autograd, rvq_reference
from stillhouse.ops.random import philox_gumbel


def problem(n, d, k, q, *, dtype=torch.float32):
    generator = torch.Generator("cpu").manual_seed(0)
    x, tables = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
        for shape in ((n, d), (q, k, d))
    )
    device = torch.get_default_device()
    return x.to(device, dtype), (tables * 0.7).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "d", "codes", "k"), [(60, 44, 200, 5), (3, 128, 70, 70), (1, 1, 1, 1)]
)
def test_the_nearest_of_each_row(n, d, codes, k, dtype, level):
    x, tables = problem(n, d, codes, 1, dtype=dtype)
    packed = rvq_autograd.pack(tables[None], "l2", None)
    found, error = rvq_autograd.candidates(
        x[None], tables[None], packed, k, metric="l2", sizes=None
    )
    distance = (x.double()[:, None] - tables[0].double()).square().sum(-1)
    nearest, order = distance.sort(dim=-1, stable=True)
    close = (nearest.diff(dim=-1) < 1e-5).any(-1) if codes > 1 else torch.zeros(n).bool()
    assert torch.equal(found[0][~close], order[:, :k][~close])
    torch.testing.assert_close(error[0].double(), nearest[:, :k], rtol=1e-4, atol=1e-4)
    assert found[0].sort(-1).values.diff(dim=-1).ne(0).all()  # none twice


def test_equal_candidates_come_in_order(level):
    table = torch.ones(1, 150, 3)
    packed = rvq_autograd.pack(table[None], "l2", None)
    rows = torch.zeros(1, 9, 3)
    found, _ = rvq_autograd.candidates(rows, table[None], packed, 4, metric="l2", sizes=None)
    assert found[0].tolist() == [[0, 1, 2, 3]] * 9


def test_a_beam_that_keeps_all_finds_the_nearest_sum(level):
    x, tables = problem(40, 3, 5, 3, dtype=torch.float64)
    codes = ops.rvq_encode(x, tables, beam=25)
    every = torch.tensor(list(itertools.product(range(5), repeat=3)))
    sums = sum(tables[stage][every[:, stage]] for stage in range(3))
    distance = (x[:, None] - sums).square().sum(-1)
    assert torch.equal(codes, every[distance.argmin(-1)])
    assert not torch.equal(codes, ops.rvq_encode(x, tables))  # one by one is not as near


def test_wider_beams_are_nearer(level):
    x, tables = problem(20 if level == "simt" else 300, 8, 64, 4)
    assert torch.equal(ops.rvq_encode(x, tables, beam=1), ops.rvq_encode(x, tables))
    errors = []
    for beam in (1, 4, 16):
        codes = ops.rvq_encode(x, tables, beam=beam)
        errors.append((x - ops.rvq_decode(codes, tables)).square().sum(-1).mean().item())
    assert errors[0] > 1.05 * errors[1] > 1.05 * errors[2]


def test_a_beam_ends_where_a_row_does(level):
    x, tables = problem(30, 6, 20, 4)
    depth = torch.arange(30) % 5
    codes = ops.rvq_encode(x, tables, beam=3, num_quantizers=depth)
    for stages in range(1, 5):
        alone = ops.rvq_encode(x, tables, beam=3, num_quantizers=stages)
        assert torch.equal(codes[depth == stages][:, :stages], alone[depth == stages])
        assert (codes[depth == stages][:, stages:] == -1).all()
    assert (codes[depth == 0] == -1).all()


def test_draws_are_the_counters(level):
    """Code by code as plain torch draws them in float64."""
    x, tables = problem(200, 6, 90, 3, dtype=torch.float64)
    temperature, seed = 1.7, 12345678901234
    position = torch.arange(200) * 7 + 2**40
    codes = ops.rvq_encode(x, tables, temperature=temperature, seed=seed, position=position)
    residual = x
    for stage in range(3):
        distance = (residual[:, None] - tables[stage]).square().sum(-1)
        noise = philox_gumbel(seed, position, stage, 90)
        assert torch.equal(codes[:, stage], (noise - distance / temperature).argmax(-1))
        residual = residual - tables[stage][codes[:, stage]]
    other = ops.rvq_encode(
        x[50:], tables, temperature=temperature, seed=seed, position=position[50:]
    )
    assert torch.equal(other, codes[50:])
    assert not torch.equal(codes, ops.rvq_encode(x, tables, temperature=temperature, seed=seed))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_the_law_of_draws(metric, level):
    """Chi-square of many draws of one row: 11 degrees of freedom pass 31.3 once in a thousand."""
    n = 4_000 if level == "simt" else 20_000
    x, tables = problem(1, 4, 12, 1)
    codes = ops.rvq_encode(x.expand(n, -1), tables, metric=metric, temperature=2.0, seed=5)[:, 0]
    table = tables[0].double()
    score = -(x.double() - table).square().sum(-1)
    if metric == "cosine":
        score = 2 * (x.double() @ torch.nn.functional.normalize(table, dim=-1).T)[0]
    law = (score / 2.0).softmax(-1)
    counts = torch.bincount(codes, minlength=12).double()
    assert ((counts - n * law).square() / (n * law)).sum() < 31.3
    wrong = (score / 1.7).softmax(-1)  # the test has power
    assert ((counts - n * wrong).square() / (n * wrong)).sum() > 31.3


def test_draws_with_depth_and_rows_that_are_not_finite(level):
    x, tables = problem(6, 4, 12, 3)
    x[1, 2], x[2, 0] = torch.nan, torch.inf
    depth = torch.tensor([3, 3, 3, 0, 1, 2])
    for options in (dict(temperature=1.0, seed=1), dict(beam=2)):
        codes = ops.rvq_encode(x, tables, num_quantizers=depth, **options)
        assert (codes[1:4] == -1).all()
        assert ((codes >= 0).sum(-1) == torch.tensor([3, 0, 0, 0, 1, 2])).all()


def test_codes_that_are_given(level):
    x, tables = problem(50, 6, 20, 4)
    codes = ops.rvq_encode(x, tables, beam=4)
    row, table = x.clone().requires_grad_(), tables.clone().requires_grad_()
    found = ops.rvq(row, table, codes=codes)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.out, ops.rvq_decode(codes, tables))
    (found.out.sum() + found.error.sum()).backward()
    left = x - sum(tables[stage][codes[:, stage]] for stage in range(4))
    torch.testing.assert_close(found.error[:, -1], left.square().sum(-1))
    upstream = torch.ones(1, 50, 4)
    d_x, d_tables = rvq_reference.gradient(upstream, x[None], codes[None], tables[None], True, True)
    torch.testing.assert_close(row.grad, 1 + d_x[0])
    torch.testing.assert_close(table.grad, d_tables[0])
    shallow = ops.rvq(x, tables, codes=codes, mask=torch.arange(50) < 10)
    assert (shallow.codes[10:] == -1).all()
    assert (shallow.error[10:] == 0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(beam=0), "beam must be at least 1"),
        (dict(temperature=-1.0), "temperature must be a number from 0"),
        (dict(temperature=1.0), "need a seed"),
        (dict(beam=2, metric="cosine"), "a beam is of nearest codes"),
        (dict(beam=2, temperature=1.0, seed=0), "a beam is of nearest codes"),
        (dict(beam=2, return_margin=True), "margins are those of nearest codes"),
        (dict(temperature=1.0, seed=0, position=torch.zeros(2)), "position must have the rows'"),
    ],
)
def test_bad_searches(options, words):
    x, tables = problem(3, 4, 6, 2)
    with pytest.raises(ValueError, match=words):
        ops.rvq_encode(x, tables, **options)


def test_the_reference_says_the_same(monkeypatch):
    x, tables = problem(40, 6, 20, 3, dtype=torch.float64)
    calls = [
        dict(beam=3),
        dict(temperature=0.8, seed=3),
        dict(temperature=2.0, seed=3, metric="cosine"),
    ]
    ours = [ops.rvq_encode(x, tables, **options) for options in calls]
    monkeypatch.setattr(rvq_autograd, "has_kernel", lambda x: False)
    for codes, options in zip(ours, calls, strict=True):
        assert torch.equal(codes, ops.rvq_encode(x, tables, **options))
