import pytest
import torch

from stillhouse.train import reduce

LOSSES = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, False, False]])
WEIGHT = torch.tensor([[1.0, 1.0, 2.0], [4.0, 9.0, 9.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(over="tokens"), 66 / 6),
        (dict(over="tokens", mask=MASK), 16 / 4),
        (dict(over="tokens", mask=MASK, weight=WEIGHT), 49 / 8),
        (dict(over="tokens", mask=MASK, count=32), 16 / 32),
        (dict(over="sequences", mask=MASK), (2 + 10) / 2),
        (dict(over="sequences", mask=MASK, weight=WEIGHT), (9 / 4 + 10) / 2),
        (dict(over="sequences", mask=MASK, count=8), 12 / 8),
        (dict(over="batch", mask=MASK), 16 / 2),
        (dict(over="batch", mask=MASK, count=4), 16 / 4),
        (dict(over="rows", mask=MASK), 16 / 6),
    ],
)
def test_by_hand(options, expected):
    assert reduce(LOSSES, **options).item() == pytest.approx(expected, rel=1e-15)


def test_flat_rows_know_their_sequences():
    sequence = torch.tensor([0, 0, 0, 2, 2, 2])
    options = dict(mask=MASK.reshape(-1), over="sequences", sequence=sequence)
    assert reduce(LOSSES.reshape(-1), **options).item() == 6
    with pytest.raises(ValueError, match="needs sequence="):
        reduce(LOSSES.reshape(-1), over="sequences")
    with pytest.raises(ValueError, match="needs count=B"):
        reduce(LOSSES.reshape(-1), over="batch")


def test_not_reduced():
    assert reduce(LOSSES, MASK, over=None).tolist() == [[1, 2, 3], [10, 0, 0]]


def test_a_row_that_does_not_count_may_be_nan():
    losses = LOSSES.clone()
    losses[1, 1] = torch.nan
    losses.requires_grad_()
    result = reduce(losses, MASK)
    result.backward()
    assert result.item() == 4
    assert losses.grad.tolist() == [[0.25, 0.25, 0.25], [0.25, 0, 0]]


@pytest.mark.parametrize("over", ["tokens", "sequences", "batch", "rows"])
def test_nothing_counts(over):
    losses = LOSSES.clone().requires_grad_()
    result = reduce(losses, torch.zeros_like(MASK), over=over)
    result.backward()
    assert result.item() == 0
    assert losses.grad.abs().max() == 0


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"mask has shape \(2,\), per_row \(2, 3\)"):
        reduce(LOSSES, MASK[:, 0])
    with pytest.raises(ValueError, match="mask must be bool"):
        reduce(LOSSES, MASK.float())
    with pytest.raises(ValueError, match="over must be .* got 'all'"):
        reduce(LOSSES, over="all")
