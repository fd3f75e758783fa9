"""The kernels against the reference, on 10^5 random trees with given coins."""

import pytest
import torch

from stillhouse import ops

MODES = ["greedy", "target", "multi_round", "traversal", "typical"]
# Thresholds are as exact as the rows: residuals are differences of float32 exponentials.
EDGES = {"logits": 1e-4, "probabilities": 1e-9}


def problem(n, size, vocabulary, seed, kinds, form):
    """Random trees, logits and coins; a token is proposed at random, whatever its kind says."""
    generator = torch.Generator("cpu").manual_seed(seed)
    uniform = torch.rand(n, size, generator=generator, device="cpu")
    parents = (uniform * torch.arange(size, device="cpu")).int()
    parents[:, 0] = -1
    tokens = torch.randint(0, vocabulary, (n, size), generator=generator, device="cpu").int()
    kind = torch.tensor(kinds, dtype=torch.uint8, device="cpu")
    kind = kind[torch.randint(0, len(kinds), (n, size), generator=generator, device="cpu")]
    rows = 2 * torch.randn(2, n, size, vocabulary, generator=generator, device="cpu")
    if form == "probabilities":
        rows = rows.double().softmax(-1)
    coins = torch.rand(n, size, 2, generator=generator, dtype=torch.float64, device="cpu")
    device = torch.get_default_device()
    return [x.to(device) for x in (tokens, parents, kind, rows[0], rows[1], coins)]


def same(a, b):
    return ((a.out_tokens == b.out_tokens) & (a.path == b.path)).all(1)


# Kinds that stand beside each other at a node.
@pytest.mark.parametrize("kinds", [(0,), (1,), (2, 3), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", EDGES)
def test_random_trees(form, mode, kinds, kernel_way, reference):
    n, edge = 100 if kernel_way == "simt" else 2000, EDGES[form]
    whole = problem(n, 8, 6, MODES.index(mode), kinds, form)
    words = {"temperature": 0.8} if form == "logits" else {"is_prob": True}

    def verify(move=0.0, rows=slice(None)):
        tokens, parents, kind, target, draft, coins = (each[rows] for each in whole)
        links = ops.tree_build(parents)
        words_of_rows = words | {"kind": kind, "coins": coins + move}
        return ops.tree_verify(tokens, links, target, draft, mode=mode, **words_of_rows)

    found, exact = verify(), reference(verify)
    agree = same(found, exact)
    torch.testing.assert_close(
        found.accept_prob[agree], exact.accept_prob[agree], atol=edge, rtol=max(edge, 1e-6)
    )
    assert (found.status[agree] & 7 == 0).all()
    # Where they differ a coin must lie at a threshold: a little to one side decides otherwise.
    differ = torch.nonzero(~agree)[:, 0]
    assert len(differ) <= n / 1000
    if len(differ):
        low, high = (reference(lambda move=move: verify(move, differ)) for move in (-edge, edge))
        assert not same(low, high).any()


# Of the largest logit above the others: without it 1e-6, 1e-13, 1e-30 or nothing is left.
@pytest.mark.parametrize("gap", [14, 30, 70, 800])
@pytest.mark.parametrize("kinds", [(0,), (2, 3)], ids=str)
@pytest.mark.parametrize("mode", ["multi_round", "traversal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_confident_proposals(dtype, mode, kinds, gap, kernel_way, reference):
    """What is left of a proposal beside a token that has nearly all of it is not lost."""
    n = 100 if kernel_way == "simt" else 1000
    tokens, _, kind, target, draft, coins = problem(n, 4, 600, gap, kinds, "logits")
    parents = torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32).expand(n, -1)
    # The first child is the token that is nearly sure, drawn or not; four tokens count.
    kind[:, 1] = kinds[0]
    kind[:, 2:] = kinds[-1]
    tokens = tokens % 4
    tokens[:, 1] = 0
    target[..., 4:] = draft[..., 4:] = -torch.inf
    draft[..., 0] += gap
    target, draft = target.to(dtype), draft.to(dtype)
    tokens[:, 2:] = 1 + torch.arange(n)[:, None] % 2 + torch.arange(2)
    links = ops.tree_build(parents.contiguous())

    def verify(move=0.0, rows=slice(None)):
        of_rows = ops.TreeLinks(*(each[rows] for each in links))
        given = {"kind": kind[rows], "coins": coins[rows] + move}
        return ops.tree_verify(tokens[rows], of_rows, target[rows], draft[rows], mode=mode, **given)

    found, exact = verify(), reference(verify)
    assert (found.status & 7 == 0).all()
    differ = torch.nonzero(~same(found, exact))[:, 0]
    assert len(differ) <= n / 100
    if len(differ):
        low, high = (reference(lambda move=move: verify(move, differ)) for move in (-1e-4, 1e-4))
        assert not same(low, high).any()
