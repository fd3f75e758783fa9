"""k-means: against Lloyd's iterations in float64, and what becomes of centres without rows."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse.nn import kmeans
from stillhouse.nn.kmeans import centres, rows_that_count
from stillhouse.nn.ranks import Ranks


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(count, each, width, seed=0):
    """Rows around far apart points, shuffled, and the points."""
    points = 20 * rows(count, width, seed=seed)
    x = (points[:, None] + rows(count, each, width, seed=seed + 1)).flatten(0, 1)
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))], points


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_an_iteration_is_lloyds(metric):
    x, k = rows(200, 5).double(), 7
    steps = [kmeans(x, k, iterations=n, seed=3, metric=metric) for n in (1, 2)]
    if metric == "l2":
        nearest = torch.cdist(x, steps[0]).argmin(-1)
    else:
        unit = torch.nn.functional.normalize
        nearest = (unit(x, dim=-1) @ unit(steps[0], dim=-1).T).argmax(-1)
    assert len(nearest.unique()) == k
    expected = torch.stack([x[nearest == n].mean(0) for n in range(k)])
    torch.testing.assert_close(steps[1], expected)


def test_centres_without_rows_move_to_others():
    # Two of eight clusters' rows begin as centres of nothing: random rows leave some clusters out.
    for seed in range(5):
        x, points = clusters(8, 50, 3, seed=seed)
        found = kmeans(x, 40, iterations=20, seed=seed)
        distance = torch.cdist(points, found).amin(-1)
        assert (distance < 2).all()
        nearest = torch.cdist(x, found).argmin(-1)
        assert len(nearest.unique()) == 40


def test_equal_centres_are_told_apart():
    """All rows drawn first are equal, all but two at one place."""
    x = torch.zeros(100, 2)
    x[7], x[40] = torch.tensor([5.0, 0]), torch.tensor([0, 9.0])
    found = kmeans(x, 3, iterations=3, seed=0)
    assert {tuple(row) for row in found.tolist()} == {(0, 0), (5, 0), (0, 9)}


@pytest.mark.parametrize("n", [1, 3, 7])
def test_fewer_rows_than_centres(n):
    x = rows(n, 4)
    found = kmeans(x, 8, seed=1)
    assert found.shape == (8, 4)
    assert torch.cdist(found, x).amin(-1).max() < 1e-6  # every centre is a row
    assert torch.cdist(x, found).amin(-1).max() < 1e-6  # every row is a centre
    padded = torch.cat([x, 100 + rows(20, 4)])
    found = kmeans(padded, 8, seed=1, mask=torch.arange(len(padded)) < n)
    assert torch.cdist(found, x).amin(-1).max() < 1e-6


def test_rows_that_do_not_count():
    x = rows(60, 4)
    mask = torch.arange(60) % 3 > 0
    spoilt = torch.where(mask[:, None], x, 1e6)
    spoilt[0], spoilt[4] = torch.nan, torch.inf
    mask_found = kmeans(spoilt, 5, seed=2, mask=mask)
    assert mask_found.isfinite().all()
    assert mask_found.abs().max() < 10
    spoilt[mask.logical_not()] = -7.0
    assert (kmeans(spoilt, 5, seed=2, mask=mask) == mask_found).all()


def test_seeds_and_global_randomness():
    x = rows(300, 6)
    state = torch.get_rng_state()
    first, again, other = (kmeans(x, 20, seed=seed, iterations=1) for seed in (1, 1, 2))
    assert (first == again).all()
    assert not torch.equal(first, other)
    assert (torch.get_rng_state() == state).all()


def test_dtypes():
    x = rows(80, 4)
    assert kmeans(x.double(), 6, seed=0).dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        rounded = x.to(dtype)
        assert (kmeans(rounded, 6, seed=0) == kmeans(rounded.float(), 6, seed=0)).all()


def test_counts_and_sums_are_those_of_the_centres():
    x = rows(2, 90, 4)
    counted = rows_that_count(x, None)
    generator = torch.Generator().manual_seed(0)
    found, counts, sums = centres(x, 5, 4, generator, counted, "l2", Ranks(False))
    assert (counts.sum(-1) == 90).all()
    torch.testing.assert_close(found, sums / counts[..., None])
    torch.testing.assert_close(sums.sum(1), x.sum(1))


def test_no_matrix_of_rows_by_centres():
    class Largest(TorchDispatchMode):
        """The most numbers that a tensor of any op has had."""

        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for each in torch.utils._pytree.tree_leaves(result):
                if isinstance(each, torch.Tensor):
                    self.numbers = max(self.numbers, each.numel())
            return result

    x, k = rows(2**12, 8), 2**10
    with Largest() as largest:
        kmeans(x, k, seed=0, iterations=2)
    assert x.numel() <= largest.numbers <= 2 * x.numel() < len(x) * k


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(4), {}, ValueError, r"x must be \[N, D\]"),
        (torch.ones(4, 2, dtype=torch.int64), {}, TypeError, "float"),
        (torch.ones(4, 2), {"k": 0}, ValueError, "k >= 1"),
        (torch.ones(4, 2), {"iterations": 0}, ValueError, "iterations >= 1"),
        (torch.ones(0, 2), {}, ValueError, "no row"),
        (torch.full((4, 2), torch.nan), {}, ValueError, "no row"),
        (torch.ones(4, 2), {"mask": torch.zeros(4, dtype=torch.bool)}, ValueError, "no row"),
        (torch.ones(4, 2), {"mask": torch.ones(4)}, ValueError, "mask must be bool"),
        (torch.ones(4, 2), {"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask must be"),
        (torch.ones(4, 2), {"metric": "l1"}, ValueError, "metric must be one of"),
    ],
)
def test_what_is_refused(x, options, error, message):
    with pytest.raises(error, match=message):
        kmeans(x, **{"k": 2, "seed": 0, **options})
