"""The kernels against the reference, on 10^5 random trees with given coins."""

import pytest
import torch

from stillhouse import ops

MODES = ["greedy", "target", "multi_round", "traversal", "typical"]
EDGE = 1e-6


def problem(n, size, vocabulary, seed, kinds):
    """Random trees, logits and coins; a token is proposed at random, whatever its kind says."""
    generator = torch.Generator("cpu").manual_seed(seed)
    uniform = torch.rand(n, size, generator=generator, device="cpu")
    parents = (uniform * torch.arange(size, device="cpu")).int()
    parents[:, 0] = -1
    tokens = torch.randint(0, vocabulary, (n, size), generator=generator, device="cpu").int()
    kind = torch.tensor(kinds, dtype=torch.uint8, device="cpu")
    kind = kind[torch.randint(0, len(kinds), (n, size), generator=generator, device="cpu")]
    rows = 2 * torch.randn(2, n, size, vocabulary, generator=generator, device="cpu")
    coins = torch.rand(n, size, 2, generator=generator, dtype=torch.float64, device="cpu")
    device = torch.get_default_device()
    return [x.to(device) for x in (tokens, parents, kind, rows[0], rows[1], coins)]


def same(a, b):
    return ((a.out_tokens == b.out_tokens) & (a.path == b.path)).all(1)


# Kinds that stand beside each other at a node.
@pytest.mark.parametrize("kinds", [(0,), (1,), (2, 3), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_random_trees(mode, kinds, kernel_way, reference):
    n = 4000 if kernel_way != "simt" else 100
    tokens, parents, kind, target, draft, coins = problem(n, 8, 6, MODES.index(mode), kinds)
    words = dict(mode=mode, kind=kind, temperature=0.8)

    def verify(coins, rows=slice(None)):
        return ops.tree_verify(
            tokens[rows],
            ops.tree_build(parents[rows]),
            target[rows],
            draft[rows],
            coins=coins[rows],
            **(words | {"kind": kind[rows]}),
        )

    found, exact = verify(coins), reference(lambda: verify(coins))
    agree = same(found, exact)
    torch.testing.assert_close(
        found.accept_prob[agree], exact.accept_prob[agree], atol=1e-5, rtol=1e-5
    )
    assert (found.status[agree] & 7 == 0).all()
    # Where they differ a coin must lie at a threshold: a little to one side decides otherwise.
    edge = torch.nonzero(~agree)[:, 0]
    assert len(edge) <= n / 1000
    if len(edge):
        low, high = (
            reference(lambda move=move: verify(coins + move, edge)) for move in (-EDGE, EDGE)
        )
        assert not same(low, high).any()
