"""Parents that are no tree: what is linked in spite of them, which a GPU does not check."""

import pytest
import torch

from stillhouse.ops import tree_registered

# The nodes up to the first wrong one, and what lies behind it.
WRONG = {
    "parent behind": ([-1, 0, 0, 4, 1, 1], 3),
    "second root": ([-1, 0, 0, 1, -1], 4),
    "no root": ([0, 0], 0),
    "behind padding": ([-1, 0, 0, -2, 1], 4),
    "too deep": ([-1, *range(66)], 65),
    "too many": ([-1, 0, 1, 1] + [0] * 70, 67),
}


@pytest.mark.parametrize("name", WRONG)
def test_links_end_before_the_wrong_node(name, kernel_way, reference):
    parents, node = WRONG[name]
    given = torch.tensor([parents, [-1] + [-2] * (len(parents) - 1)], dtype=torch.int32)
    found = tree_registered.build(given)
    assert found[-1].tolist() == [node, -1]
    for of_kernel, of_reference in zip(
        found, reference(lambda: tree_registered.build(given)), strict=True
    ):
        assert torch.equal(of_kernel, of_reference)
    # They are the links of the tree that ends there.
    kept = torch.tensor([parents[:node] + [-2] * (len(parents) - node)], dtype=torch.int32)
    if node > 0:
        for of_wrong, of_right in zip(found[:4], tree_registered.build(kept)[:4], strict=True):
            assert torch.equal(of_wrong[:1], of_right)
