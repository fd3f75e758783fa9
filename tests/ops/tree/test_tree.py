"""Links, masks and places of draft trees, against their definitions."""

import itertools

import pytest
import torch

from stillhouse import ops

FIELDS = ["first_child", "next_sibling", "depth", "ancestors"]


def random_parents(n, size, seed=0, padded=True):
    generator = torch.Generator("cpu").manual_seed(seed)
    uniform = torch.rand(n, size, generator=generator, device="cpu")
    parents = (uniform * torch.arange(size, device="cpu")).int()
    parents[:, 0] = -1
    if padded:
        length = torch.randint(1, size + 1, (n, 1), generator=generator, device="cpu")
        parents[torch.arange(size, device="cpu") >= length] = -2
    return parents.to(torch.get_default_device())


@pytest.mark.parametrize("size", [1, 2, 64, 65, 200])
def test_links(size, way):
    parents = random_parents(5, size)
    links = ops.tree_build(parents)
    assert torch.equal(links.parents, parents)
    for row, of_row in enumerate(parents.tolist()):
        above = []
        for node, parent in enumerate(of_row):
            above.append({node} | (above[parent] if parent >= 0 else set()))
            if parent == -2:
                above[node] = set()
            children = [child for child in range(size) if of_row[child] == node]
            siblings = [other for other in range(node + 1, size) if of_row[other] == parent]
            is_node = parent != -2
            assert links.first_child[row, node] == (children[0] if children else -1)
            sibling = siblings[0] if siblings and node > 0 and is_node else -1
            assert links.next_sibling[row, node] == sibling
            assert links.depth[row, node] == len(above[node]) - 1
            words = [0] * -(-size // 64)
            for j in above[node]:
                words[j // 64] |= 1 << j % 64
            found = [word % 2**64 for word in links.ancestors[row, node].tolist()]
            assert found == words


WRONG = [
    ([0, 0], "have 0 at node 0, expected -1"),
    ([-2, 0], "have -2 at node 0, expected -1"),
    ([-1, 1], "have 1 at node 1, expected 0 to 0"),
    ([-1, 0, 4, 0, 0], "have 4 at node 2, expected 0 to 1"),
    ([-1, -1], "have -1 at node 1"),
    ([-1, 0, -2, 0], "have 0 at node 3, expected -2"),
    ([-1, 0, -3], "have -3 at node 2"),
    ([-1, *range(65)], "have 64 at node 65, a tree is at most 64 deep"),
    ([-1] + [0] * 65, "have 0 at node 65, a tree is at most 64 deep, and a node has at most 64"),
]


@pytest.mark.parametrize(("parents", "words"), WRONG, ids=lambda x: str(x)[:30])
def test_parents_that_are_no_tree(parents, words, way):
    if way == "cuda":
        pytest.skip("links are checked on the CPU")
    right = [-1] + [-2] * (len(parents) - 1)
    with pytest.raises(ValueError, match=words) as caught:
        ops.tree_build(torch.tensor([right, parents], dtype=torch.int32))
    assert "tree 1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_largest_trees(way):
    deep = torch.arange(-1, 64, dtype=torch.int32)[None]
    assert ops.tree_build(deep).depth[0, -1] == 64
    wide = torch.tensor([[-1] + [0] * 64], dtype=torch.int32)
    assert ops.tree_build(wide).next_sibling[0, 63] == 64


def test_build_raises():
    with pytest.raises(TypeError, match=r"parents must be torch.int32, got torch.int64"):
        ops.tree_build(torch.tensor([[-1]]))
    for shape in ((3,), (1, 0), (1, 1025)):
        parents = torch.full(shape, -1, dtype=torch.int32)
        with pytest.raises(ValueError, match=r"parents must be \[B, T\] with T from 1 to 1024"):
            ops.tree_build(parents)


def test_paths_lead_to_all_leaves(device):
    parents = random_parents(6, 20)
    paths = ops.tree_paths(ops.tree_build(parents)).tolist()
    for of_row, of_tree in zip(parents.tolist(), paths, strict=True):
        nodes = [node for node, parent in enumerate(of_row) if parent != -2]
        leaves = [node for node in nodes if node not in of_row]
        found = [[node for node in path if node >= 0] for path in of_tree]
        assert [path[-1] for path in found if path] == leaves
        for path in filter(None, found):
            assert path[0] == 0
            assert all(of_row[b] == a for a, b in itertools.pairwise(path))


@pytest.mark.parametrize("kv_len", [0, 5, 64])
@pytest.mark.parametrize("size", [7, 70])
def test_masks(size, kv_len, device):
    links = ops.tree_build(random_parents(3, size))
    mask = ops.tree_mask(links, kv_len)
    assert mask.shape == (3, size, kv_len + size)
    assert mask.dtype == torch.bool
    for row, of_row in enumerate(links.parents.tolist()):
        for node, parent in enumerate(of_row):
            seen = {kv_len + node} | (set(range(kv_len)) if parent != -2 else set())
            while parent >= 0:
                seen.add(kv_len + parent)
                parent = of_row[parent]
            assert set(mask[row, node].nonzero()[:, 0].tolist()) == seen
    added = ops.tree_mask(links, kv_len, "additive", torch.bfloat16)
    assert added.dtype == torch.bfloat16
    assert torch.equal(added == 0, mask)
    assert (added[~mask] == -torch.inf).all()
    bits = ops.tree_mask(links, kv_len, "bits")
    columns = torch.arange(kv_len + size)
    assert torch.equal(bits[..., columns // 64] >> columns % 64 & 1 == 1, mask)
    if kv_len == 0:
        nodes = links.depth >= 0
        assert torch.equal(bits[nodes], links.ancestors[nodes])


def test_mask_and_place_errors():
    links = ops.tree_build(torch.tensor([[-1, 0]], dtype=torch.int32))
    with pytest.raises(ValueError, match="mode must be one of bool, bits, additive, got 'x'"):
        ops.tree_mask(links, mode="x")
    with pytest.raises(ValueError, match="kv_len must be at least 0, got -1"):
        ops.tree_mask(links, -1)
    with pytest.raises(ValueError, match="needs a float dtype, got torch.int32"):
        ops.tree_mask(links, mode="additive", dtype=torch.int32)
    with pytest.raises(ValueError, match=r"start must be an int or \[1\], got \(2,\)"):
        ops.tree_positions(links, torch.zeros(2))
    with pytest.raises(ValueError, match=r"path must be \[B, D \+ 1\], got \(2,\)"):
        ops.kv_gather_indices(torch.zeros(2))
    with pytest.raises(ValueError, match=r"kv_len must be an int or \[1\], got \(2,\)"):
        ops.kv_gather_indices(torch.zeros(1, 2), torch.zeros(2))


def test_places(device):
    links = ops.tree_build(torch.tensor([[-1, 0, 1, -2], [-1, 0, 0, 2]], dtype=torch.int32))
    assert ops.tree_positions(links, 7).tolist() == [[7, 8, 9, 7], [7, 8, 8, 9]]
    start = torch.tensor([3, 10])
    assert ops.tree_positions(links, start).tolist() == [[3, 4, 5, 3], [10, 11, 11, 12]]
    path = torch.tensor([[0, 2, 5, -1], [0, -1, -1, -1]], dtype=torch.int32)
    cache = torch.arange(100).expand(2, 100)
    found = cache.gather(1, ops.kv_gather_indices(path, start))
    assert found.tolist() == [[3, 5, 8, 6], [10, 11, 12, 13]]
