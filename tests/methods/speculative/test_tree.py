"""Draft trees: what they refuse, and how a batch of them is padded."""

import pytest
import torch

from stillhouse.methods.speculative import DraftTree, batch_trees


def test_chain_is_a_path():
    tree = DraftTree.chain([5, 6, 7])
    assert tree.tokens.tolist() == [5, 6, 7]
    assert tree.parents.tolist() == [-1, 0, 1]
    assert tree.kind.tolist() == [2, 2, 2]
    assert len(DraftTree.chain([5])) == 1


@pytest.mark.parametrize(
    ("parents", "complaint"),
    [
        ([0, 0, 1], r"expected parents\[0\] = -1"),
        ([-1, 1, 0], r"0 <= parents\[i\] < i, got \[-1, 1, 0\]"),  # its own parent
        ([-1, 2, 0], r"0 <= parents\[i\] < i"),  # a cycle, or a child before its parent
        ([-1, 0, -1], r"0 <= parents\[i\] < i"),  # a second root
        ([-1, 0], r"expected parents \[T\] with T >= 1 as tokens \[3\], got \[2\]"),
    ],
)
def test_what_is_no_tree_is_refused(parents, complaint):
    with pytest.raises(ValueError, match=complaint):
        DraftTree.of([1, 2, 3], parents)


def test_other_bad_input_is_one_line():
    ids = torch.tensor([1, 2])
    parents, kind = torch.tensor([-1, 0], dtype=torch.int32), torch.tensor([2, 2]).byte()
    with pytest.raises(TypeError, match="expected tokens to be torch.int32 on the CPU, got torch"):
        DraftTree(ids, parents, kind)
    with pytest.raises(ValueError, match="expected token ids >= 0, got -4"):
        DraftTree.chain([1, -4])
    with pytest.raises(ValueError, match="expected kinds 0 to 3, got 4"):
        DraftTree.chain([1, 2], kind=4)
    with pytest.raises(ValueError, match=r"expected tokens \[T\] with T >= 1"):
        DraftTree.chain([])
    with pytest.raises(ValueError, match="expected scores"):
        DraftTree.of([1, 2], [-1, 0], scores=torch.zeros(3))
    with pytest.raises(ValueError, match="expected at least one tree"):
        batch_trees([])


@pytest.mark.parametrize("kind", [0, 1, 3])
def test_a_sampled_node_needs_the_law_it_was_drawn_from(kind):
    with pytest.raises(ValueError, match="needs log_probs"):
        DraftTree.chain([1, 2], kind=kind)
    DraftTree.chain([1, 2], kind=kind, log_probs=torch.zeros(2, 3))
    DraftTree.chain([1], kind=kind)  # a root was not drawn


def test_log_probs_have_a_row_for_each_node_and_a_column_for_each_token():
    with pytest.raises(ValueError, match=r"expected log_probs float \[T, V\] with T = 2"):
        DraftTree.chain([1, 2], log_probs=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="expected token ids below the 2 columns of log_probs"):
        DraftTree.chain([1, 2], log_probs=torch.zeros(2, 2))


def test_a_batch_is_padded_at_the_end():
    rows = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    trees = [
        DraftTree.of([3, 4, 5], [-1, 0, 0]),
        DraftTree.chain([6, 7], kind=0, log_probs=rows.double()),
        DraftTree.chain([8]),
    ]
    tokens, parents, kind, draft = batch_trees(trees, size=4)
    assert tokens.tolist() == [[3, 4, 5, 0], [6, 7, 0, 0], [8, 0, 0, 0]]
    assert parents.tolist() == [[-1, 0, 0, -2], [-1, 0, -2, -2], [-1, -2, -2, -2]]
    assert kind.tolist() == [[2, 2, 2, 2], [0, 0, 2, 2], [2, 2, 2, 2]]
    assert draft.shape == (3, 4, 9)
    assert draft.dtype == torch.float32
    assert torch.equal(draft[1, :2], rows)
    assert draft[0].abs().sum() == draft[1, 2:].abs().sum() == draft[2].abs().sum() == 0


def test_a_batch_has_one_vocabulary_and_fits():
    wide = DraftTree.chain([1, 2], kind=1, log_probs=torch.zeros(2, 5))
    narrow = DraftTree.chain([1, 2], kind=1, log_probs=torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"expected one vocabulary for all trees, got \[4, 5\]"):
        batch_trees([wide, narrow])
    with pytest.raises(ValueError, match="expected trees of at most size = 1 nodes, got 2"):
        batch_trees([wide], size=1)
