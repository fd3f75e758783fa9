"""Lossy speculative decoding: laws by hand, chains by enumeration of every draft and coin."""

import itertools

import pytest
import torch

from stillhouse import ops
from stillhouse.methods.speculative import (
    block_efficiency,
    lenience,
    lenient_chain,
    lenient_law,
)

P = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
Q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("epsilon", "kind", "accepted", "emitted"),
    [
        (1.0, "linear", 0.6, [0.6, 0.3, 0.1]),
        (0.5, "linear", 0.7, [0.5, 0.3, 0.2]),
        (0.5, "square", 0.9, [0.3, 0.3, 0.4]),
        (0.5, "exponential", 0.2 + 0.3 + 0.1**0.5, [0.5 - 0.1**0.5 + 0.2, 0.3, 0.1**0.5]),
    ],
)
def test_the_lossy_law_by_hand(epsilon, kind, accepted, emitted):
    law = lenient_law(P, Q, epsilon, kind)
    torch.testing.assert_close(law, torch.tensor(emitted, dtype=torch.float64))
    kept = torch.minimum(Q, lenience.LENIENCE[kind](P, epsilon)).sum().item()
    assert kept == pytest.approx(accepted)


def test_exponential_lenience_in_the_papers_digits():
    law = lenient_law(P, Q, 0.5, "exponential")
    assert [round(x, 4) for x in law.tolist()] == [0.3838, 0.3, 0.3162]
    assert (law - P).abs().sum().item() / 2 == pytest.approx(0.2162, abs=5e-5)


@pytest.mark.parametrize("kind", lenience.LENIENCE)
def test_less_epsilon_is_more_acceptance_and_another_law(kind):
    generator = torch.Generator().manual_seed(1)
    p, q = torch.randn(2, 50, 7, generator=generator, dtype=torch.float64).softmax(-1)
    steps = torch.linspace(1, 0.1, 10).tolist()
    distance = [(lenient_law(p, q, e, kind) - p).abs().sum(-1).mean() / 2 for e in steps]
    accepted = [torch.minimum(q, lenience.LENIENCE[kind](p, e)).sum(-1).mean() for e in steps]
    assert distance[0] < 1e-15
    assert sorted(distance) == distance
    assert sorted(accepted) == accepted
    # Everything is kept in the end: the law is the draft model's.
    torch.testing.assert_close(lenient_law(p, q, 1e-9, "linear"), q)


def test_equal_laws_have_no_residual():
    assert torch.equal(lenient_law(P, P, 1.0), P)


def enumerated(monkeypatch, verify, gamma=2):
    """Every draft and every coin of chains over three tokens, in one batch: the weights of its
    rows, what `verify` makes of them, and the laws by path. All probabilities are sixths, so coins
    in the middles of sixths give exact sums."""

    def law(path, numbers, step):
        turn = (sum(path) * step + len(path)) % 3
        return torch.tensor(numbers[turn:] + numbers[:turn], dtype=torch.float64) / 6

    laws = {
        path: (law(path, [1, 2, 3], 1), law(path, [3, 2, 1], 2))
        for length in range(gamma + 1)
        for path in itertools.product(range(3), repeat=length)
    }
    cases = list(itertools.product(*[range(3)] * gamma, *[range(6)] * (gamma + 1)))
    drafts = [case[:gamma] for case in cases]
    coins = (torch.tensor([case[gamma:] for case in cases]) + 0.5) / 6
    p, q = (
        torch.stack([torch.stack([laws[d[:i]][side] for i in range(gamma + 1)]) for d in drafts])
        for side in range(2)
    )
    weight = torch.ones(len(cases), dtype=torch.float64) / 6 ** (gamma + 1)
    for step in range(gamma):
        drawn = torch.tensor([d[step] for d in drafts])
        weight *= q[torch.arange(len(cases)), step, drawn]
    tokens = torch.tensor([(0, *d) for d in drafts], dtype=torch.int32)

    def uniform(seed, position, node, stream):
        position, node = torch.broadcast_tensors(position, torch.as_tensor(node))
        return coins[position, node - 1 if stream == 0 else torch.full_like(node, gamma)].double()

    monkeypatch.setattr(lenience, "philox_uniform", uniform)
    return weight, verify(tokens, p, q, torch.arange(len(cases))), laws


def emitted(weight, out, laws, gamma=2):
    """The law of the first gamma + 1 tokens, those that were not emitted drawn from the target."""
    whole = {path: 0.0 for path in itertools.product(range(3), repeat=gamma + 1)}
    for w, row in zip(weight.tolist(), out.out_tokens.tolist(), strict=True):
        said = tuple(token for token in row if token >= 0)
        for rest in itertools.product(range(3), repeat=gamma + 1 - len(said)):
            path, share = said + rest, w
            for place in range(len(said), gamma + 1):
                share *= laws[path[:place]][0][path[place]].item()
            whole[path] += share
    return whole


def test_a_lossless_chain_has_the_targets_law(monkeypatch):
    def verify(tokens, p, q, position):
        return lenient_chain(tokens, p, q, 1.0, seed=0, position=position, is_prob=True)

    weight, out, laws = enumerated(monkeypatch, verify)
    assert weight.sum() == pytest.approx(1, abs=1e-12)
    for path, share in emitted(weight, out, laws).items():
        exact = 1.0
        for place, token in enumerate(path):
            exact *= laws[path[:place]][0][token].item()
        assert share == pytest.approx(exact, abs=1e-12)


def test_a_lenient_chain_has_the_lossy_law(monkeypatch):
    def verify(tokens, p, q, position):
        return lenient_chain(tokens, p, q, 0.5, seed=0, position=position, is_prob=True)

    weight, out, laws = enumerated(monkeypatch, verify)
    first = torch.zeros(3, dtype=torch.float64).index_add(0, out.out_tokens[:, 0].long(), weight)
    torch.testing.assert_close(first, lenient_law(*laws[()], 0.5), atol=1e-12, rtol=0)
    assert (first - laws[()][0]).abs().max() > 0.1
    # The second token, given a first one that was kept.
    kept = (out.n_accepted > 0) & (out.out_tokens[:, 0] == 1)
    second = torch.zeros(3, dtype=torch.float64)
    second.index_add_(0, out.out_tokens[kept, 1].long(), weight[kept])
    law = lenient_law(*laws[1,], 0.5)
    torch.testing.assert_close(second / second.sum(), law, atol=1e-12, rtol=0)


def chains(batch=200, gamma=5, size=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target, draft = 2 * torch.randn(2, batch, gamma + 1, size, generator=generator)
    tokens = torch.randint(size, (batch, gamma + 1), generator=generator, dtype=torch.int32)
    return tokens, target, draft


def test_at_epsilon_one_it_is_exact_verification():
    tokens, target, draft = chains()
    parents = torch.arange(-1, tokens.shape[1] - 1, dtype=torch.int32).expand(len(tokens), -1)
    links = ops.tree_build(parents.contiguous())
    key = {"seed": 7, "position": torch.arange(len(tokens))}
    exact = ops.tree_verify(
        tokens, links, target, draft, mode="multi_round", temperature=0.7, **key
    )
    lenient = lenient_chain(tokens, target, draft, 1.0, temperature=0.7, **key)
    assert torch.equal(lenient.n_accepted, exact.n_accepted)
    assert torch.equal(lenient.out_tokens, exact.out_tokens)
    assert torch.equal(lenient.path, exact.path)
    assert 0 < lenient.n_accepted.float().mean() < tokens.shape[1] - 1


def test_a_draft_from_the_target_itself_is_kept():
    tokens, target, _ = chains()
    out = lenient_chain(tokens, target, target, 1.0, seed=0)
    assert (out.n_accepted == tokens.shape[1] - 1).all()
    assert (out.accept_prob == 1).all()
    assert torch.equal(out.out_tokens[:, :-1], tokens[:, 1:])
    assert block_efficiency(1.0, tokens.shape[1] - 1) == tokens.shape[1]


def test_a_row_depends_on_its_seed_and_place_alone():
    tokens, target, draft = chains(batch=8)
    place = torch.arange(8)
    whole = lenient_chain(tokens, target, draft, 0.8, seed=place + 3, position=place)
    alone = lenient_chain(tokens[5:6], target[5:6], draft[5:6], 0.8, seed=8, position=5)
    for mine, other in zip(alone, whole, strict=True):
        assert torch.equal(mine[0], other[5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(epsilon=0.0), r"epsilon in \(0, 1\], got 0.0"),
        (dict(epsilon=1.5), r"epsilon in \(0, 1\], got 1.5"),
        (dict(kind="log"), "no lenience 'log': expected one of linear, square, exponential"),
        (
            dict(draft=torch.zeros(2, 3, 5)),
            "4 columns, the draft model 5: they need one vocabulary",
        ),
        (dict(target=torch.zeros(2, 2, 4)), r"expected target \[2, 3\] x V, got \[2, 2, 4\]"),
        (dict(tokens=torch.full((2, 3), 4)), r"tokens in \[0, 4\)"),
        (dict(tokens=torch.zeros(3, dtype=torch.int32)), r"tokens \[B, T\]"),
        (dict(temperature=0.0), "a temperature > 0, got 0.0: verify greedily"),
        (dict(target=torch.full((2, 3, 4), torch.nan)), "target has rows that are no prob"),
        (dict(is_prob=True), "target has rows that are no probabilities: their sum is 1 off"),
    ],
)
def test_chains_that_are_refused(change, message):
    given = dict(
        tokens=torch.zeros(2, 3, dtype=torch.int32),
        target=torch.zeros(2, 3, 4),
        draft=torch.zeros(2, 3, 4),
        epsilon=0.5,
        seed=0,
    )
    with pytest.raises(ValueError, match=message):
        lenient_chain(**given | change)


def test_laws_that_are_refused():
    with pytest.raises(ValueError, match=r"one shape \[..., V\], got \[3\], \[2\]"):
        lenient_law(P, Q[:2], 0.5)
    with pytest.raises(ValueError, match="q has rows that are no probabilities"):
        lenient_law(P, 2 * Q, 0.5)
