import pytest
import torch

from stillhouse.train import RowIndex, paired, supervised_rows


def test_a_row_predicts_the_next_label():
    labels = torch.tensor([[5, -100, 6, 7], [-100, -100, -100, 9]])
    index = supervised_rows(labels)
    assert index.row.tolist() == [1, 2, 6]
    assert index.target.tolist() == [6, 7, 9]
    assert index.sequence.tolist() == [0, 0, 1]
    assert all(each.dtype == torch.int64 for each in index)


def test_nothing_supervised_is_legal():
    index = supervised_rows(torch.tensor([[3, -100], [4, -100]]))
    assert [each.tolist() for each in index] == [[], [], []]


def test_labels_must_be_a_batch():
    with pytest.raises(ValueError, match=r"\[batch, tokens\], got shape \(4,\)"):
        supervised_rows(torch.arange(4))


def test_paired_compares_targets_not_positions():
    index = supervised_rows(torch.tensor([[1, 2, 3]]))
    shifted = RowIndex(index.row + 10, index.target, index.sequence)
    paired(index, shifted)
    with pytest.raises(ValueError, match="student has 2 supervised rows and teacher 1"):
        paired(index, RowIndex(*(each[:1] for each in index)))
    with pytest.raises(ValueError, match="row 1 predicts token 3 in the student and 4"):
        paired(index, RowIndex(index.row, torch.tensor([2, 4]), index.sequence))
