"""Expected tokens and the bound of acceptance, against the exact laws and brute force."""

from fractions import Fraction
from itertools import permutations, product

import pytest
import torch

from stillhouse import ops

PLANS = ["iid", "without replacement", "deterministic", "sampled, deterministic"]


def trees(exact, k):
    """Every tree of depth 2 that can be drafted: (weight, tokens, kinds, words of its nodes)."""
    for weight, tokens, kinds, _ in exact.draws((), k):
        below = [exact.draws((token,), k) for token in tokens]
        for each in product(*below):
            share = weight
            nodes = [((), None, None), *zip(((x,) for x in tokens), kinds, (0,) * k, strict=True)]
            for number, (chance, more, used, _) in enumerate(each):
                share *= chance
                nodes += [
                    ((tokens[number], x), kind, number + 1)
                    for x, kind in zip(more, used, strict=True)
                ]
            yield share, nodes


@pytest.mark.parametrize("mode", ["target", "multi_round", "traversal"])
@pytest.mark.parametrize("plan", PLANS)
def test_expected_tokens(plan, mode, laws, trees_of):
    """Averaged over all drafts: the exact number."""
    exact = laws("sheet", plan)
    drafts = list(trees(exact, 2))
    words = [[word for word, _, _ in nodes] for _, nodes in drafts]
    parents = [[-1, *(parent for _, _, parent in nodes[1:])] for _, nodes in drafts]
    kinds = [[2, *(kind for _, kind, _ in nodes[1:])] for _, nodes in drafts]
    tokens = [[word[-1] if word else 0 for word in of] for of in words]
    p, q = (
        torch.tensor([[[float(x) for x in law(word)] for word in of] for of in words]).double()
        for law in (exact.p, exact.q)
    )
    found = ops.expected_tokens(
        torch.tensor(tokens, dtype=torch.int32),
        ops.tree_build(torch.tensor(parents, dtype=torch.int32)),
        p,
        q,
        mode=mode,
        kind=torch.tensor(kinds, dtype=torch.uint8),
    )
    weights = torch.tensor([float(weight) for weight, _ in drafts], dtype=torch.float64)
    expected = exact.tokens_per_round(mode, trees_of["full"](2, 2))
    assert weights.sum().item() == pytest.approx(1)
    assert (weights * found).sum().item() == pytest.approx(float(expected), abs=1e-6)


def bound_of_sets(p, q, k, replacement):
    """1 + min over all sets H of P(H) - Pr[all drafts in H], in fractions."""
    size = len(p)
    drafts = {}
    for tokens in product(range(size), repeat=k) if replacement else permutations(range(size), k):
        chance, left = Fraction(1), Fraction(1)
        for x in tokens:
            chance *= q[x] / left if left else 0
            left -= 0 if replacement else q[x]
        drafts[tokens] = chance
    gaps = [Fraction(0)]
    for mask in product([False, True], repeat=size):
        inside = sum(chance for tokens, chance in drafts.items() if all(mask[x] for x in tokens))
        gaps.append(sum(x for x, is_in in zip(p, mask, strict=True) if is_in) - inside)
    return 1 + min(gaps)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_bound(k, kind):
    generator = torch.Generator().manual_seed(k)
    for _ in range(20):
        p, q = torch.randint(0, 6, (2, 5), generator=generator).tolist()
        if sum(p) == 0 or sum(x > 0 for x in q) < k:
            continue
        p, q = ([Fraction(x, sum(row)) for x in row] for row in (p, q))
        found = ops.acceptance_bound([float(x) for x in p], [float(x) for x in q], k, kind=kind)
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(float(bound_of_sets(p, q, k, kind == 1)), abs=1e-12)


@pytest.mark.parametrize("plan", ["iid", "without replacement"])
@pytest.mark.parametrize("model", ["sheet", "one node", "disjoint", "zeros in p", "equal"])
def test_no_rule_passes_the_bound(model, plan, laws):
    exact = laws(model, plan)
    k = min(2, sum(x > 0 for x in exact.q(())))
    kind = {"iid": 1, "without replacement": 0}[plan]
    bound = ops.acceptance_bound(exact.p(()), exact.q(()), k, kind=kind).item()
    for mode in ("target", "multi_round", "traversal"):
        assert exact.tokens_per_round(mode, ((),) * k) - 1 <= bound + 1e-12


def test_errors():
    bound = ops.acceptance_bound
    with pytest.raises(ValueError, match="p must be probabilities"):
        bound([0.5, 0.6], [0.5, 0.5], 1)
    with pytest.raises(ValueError, match="q must be probabilities"):
        bound([0.5, 0.5], [1.5, -0.5], 1)
    with pytest.raises(ValueError, match="one vocabulary, got 2 and 1 tokens"):
        bound([0.5, 0.5], [1.0], 1)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        bound([0.5, 0.5], [0.5, 0.5], 0)
    with pytest.raises(ValueError, match="k up to the 1 of q's support, got 2 and k = 2"):
        bound([0.5, 0.5], [1.0, 0.0], 2, kind=0)
    with pytest.raises(ValueError, match="kind must be 0 or 1, got 2"):
        bound([0.5, 0.5], [0.5, 0.5], 1, kind=2)
    links = ops.tree_build(torch.tensor([[-1, 0]], dtype=torch.int32))
    tokens, p = torch.zeros(1, 2, dtype=torch.int32), torch.full((1, 2, 2), 0.5)
    with pytest.raises(ValueError, match="mode must be one of target, multi_round, traversal, got"):
        ops.expected_tokens(tokens, links, p, mode="greedy")
    with pytest.raises(ValueError, match="tree 0 cannot be verified: a row of probabilities"):
        ops.expected_tokens(tokens, links, 2 * p)
    with pytest.raises(ValueError, match=r"sampled nodes \(kind 0, 1 or 3\) need q"):
        ops.expected_tokens(tokens, links, p, kind=torch.zeros(1, 2, dtype=torch.uint8))
    assert ops.expected_tokens(tokens, links, p, mode="target").item() == 1.5
