"""The tree search: against the paper's algorithm in plain Python, and its properties."""

import numpy as np
import pytest
import torch

from stillhouse import _draft
from stillhouse.methods.speculative import BeamDrafter, DraftState, MCTSDrafter, TrigramTable


def paths(tree) -> dict[tuple[int, ...], float]:
    """{tokens behind the root: score} of each node."""
    found = [()]
    for token, parent in zip(tree.tokens.tolist()[1:], tree.parents.tolist()[1:], strict=True):
        found.append((*found[parent], token))
    assert len(set(found)) == len(found)  # each path once
    return dict(zip(found, tree.scores.tolist(), strict=True))


def state(tokens, seed=0) -> DraftState:
    return DraftState(torch.as_tensor(tokens), seed=seed)


def test_puct_by_hand():
    assert _draft.puct(1.5, 1, 0.5, 4, 32, 8) == pytest.approx(17.7428, abs=5e-5)
    assert _draft.puct(3.0, 2, 0.25, 4, 32, 8) == pytest.approx(6.9143, abs=5e-5)
    assert _draft.puct(0.0, 0, 0.25, 4, 32, 8) == float("inf")


@pytest.mark.parametrize("depth", [1, 3, 5])
@pytest.mark.parametrize("vocabulary", [4, 30, 300])
@pytest.mark.parametrize("sizes", [(24, 64), (64, 20), (7, 3)])
def test_against_the_algorithm_in_plain_python(depth, vocabulary, sizes, text, reference):
    """The same nodes with the same visits, whatever the table."""
    keep, max_nodes = sizes
    for seed in range(5):
        tokens = text(2000, vocabulary, seed).tolist()
        table, expected = TrigramTable(), reference.Table()
        table.add(tokens)
        expected.add(tokens)
        context = tokens[100:140]
        expected.update(context[-16:])
        sizes = dict(keep=keep, max_nodes=max_nodes)
        drafter = MCTSDrafter(table, iterations=60, depth=depth, **sizes)
        tree = drafter.draft(state(context, seed))
        searched = reference.search(expected, context, iterations=60, depth=depth, seed=seed)
        assert paths(tree) == reference.draft(expected, *searched, **sizes)


def test_visits_of_the_roots_children_are_the_iterations():
    """Each iteration passes through one of them, and all are drafted when enough are kept."""
    table = TrigramTable()
    table.add(np.random.default_rng(0).integers(0, 3, 500))
    drafter = MCTSDrafter(table, iterations=150, keep=1000, max_nodes=1000, adapt=False)
    visits = paths(drafter.draft(state([0, 1])))
    assert visits[()] == 150
    assert sum(count for path, count in visits.items() if len(path) == 1) == 150
    # The best successor of a pair is followed when it is made: that visit ends in its own rollout.
    first = {(): None}
    for path in visits:
        first[path] = next(iter(table.probs(*(0, 1, *path)[-2:])))
    for path, count in visits.items():
        if len(path) in (1, 2):
            longer = sum(n for other, n in visits.items() if other and other[:-1] == path)
            assert longer == count - (path[-1] == first[path[:-1]])


def test_without_exploration_the_search_is_greedy_on_value():
    """Two tokens alike but for what comes behind them: one is tried, the other followed."""
    table = TrigramTable(step=0.5)
    table.update([1, 2, 8])
    table.update([1, 2, 9])
    for _ in range(4):
        table.update([2, 9, 5])  # score 2 behind the 9
    table.update([2, 8, 5])  # 0.5 behind the 8
    drafter = MCTSDrafter(table, iterations=50, depth=2, c1=0.0, c2=1e12, adapt=False)
    visits = paths(drafter.draft(state([1, 2])))
    assert visits[(8,)] == 1
    assert visits[(9,)] == 49
    # With exploration the weaker one is not given up.
    explored = MCTSDrafter(table, iterations=50, depth=2, adapt=False).draft(state([1, 2]))
    assert paths(explored)[(8,)] > 10


def test_ties_follow_the_score_and_then_the_lower_token():
    table = TrigramTable()
    table.build([1, 2, c] for c in (7, 5, 6, 5))
    drafter = MCTSDrafter(table, iterations=1, depth=1, keep=2, adapt=False)
    assert list(paths(drafter.draft(state([1, 2])))) == [(), (5,)]
    drafter = MCTSDrafter(table, iterations=2, depth=1, keep=3, adapt=False)
    assert list(paths(drafter.draft(state([1, 2])))) == [(), (5,), (6,)]


@pytest.mark.parametrize("max_nodes", [1, 2, 7, 64])
@pytest.mark.parametrize("keep", [1, 24, 200])
def test_parents_come_first_and_the_budget_holds(max_nodes, keep, text):
    table = TrigramTable()
    tokens = text(5000, 40)
    table.add(tokens)
    drafter = MCTSDrafter(table, keep=keep, max_nodes=max_nodes)
    for start in range(0, 200, 10):
        tree = drafter.draft(state(tokens[start : start + 30]))
        assert len(tree) <= max_nodes
        assert tree.tokens[0] == tokens[start + 29]
        assert (tree.kind == 2).all()
        depth = [0]
        for parent in tree.parents.tolist()[1:]:
            depth.append(depth[parent] + 1)
        assert depth == sorted(depth)
        for node, visits in paths(tree).items():  # what was cut off had the fewest visits
            assert node == () or visits <= paths(tree)[node[:-1]]
    if keep >= 24 and max_nodes == 64:
        assert len(tree) > 40


def test_seed_and_position_key_the_rollouts(text):
    table = TrigramTable()
    tokens = text(20_000, 20)
    table.add(tokens)
    drafter, again = (MCTSDrafter(table, depth=4, keep=64, adapt=False) for _ in range(2))
    context = tokens[:50]
    first = paths(drafter.draft(state(context, 3)))
    assert paths(drafter.draft(state(context, 3))) == first
    assert paths(again.draft(state(context, 3))) == first
    assert paths(drafter.draft(state(context, 4))) != first
    assert paths(drafter.draft(state(tokens[1:50], 3))) != first  # the same pair, one step earlier


def test_a_context_strengthens_its_own_trigrams():
    table = TrigramTable()
    drafter = MCTSDrafter(table)
    assert len(drafter.draft(state([5]))) == 1
    assert len(drafter.draft(state([5, 6]))) == 1
    context = list(range(100, 120))
    assert len(drafter.draft(state(context))) == 1  # nothing known of (118, 119)
    assert table.probs(103, 104) == {}  # outside the last 16
    assert table.probs(104, 105) == {106: 0.04}
    assert table.probs(117, 118) == {119: 0.04}
    MCTSDrafter(table, adapt=False).draft(state(context))
    assert table.probs(117, 118) == {119: 0.04}
    MCTSDrafter(table, window=0).draft(state(context))
    assert table.probs(117, 118) == {119: 0.04}


def test_the_beam_has_the_highest_products(text, reference):
    """Against all paths of the table."""
    tokens = text(300, 6).tolist()
    table, expected = TrigramTable(), reference.Table()
    table.add(tokens)
    expected.add(tokens)
    drafter = BeamDrafter(table, depth=3, width=1000, max_nodes=12, adapt=False)
    found = paths(drafter.draft(state([tokens[0], tokens[1]])))
    every = {(): 0.0}
    for _ in range(3):
        for path, score in list(every.items()):
            successors = expected.find(*(tokens[0], tokens[1], *path)[-2:])
            total = sum(each for _, each in successors)
            every |= {
                (*path, token): score + np.log(each / total)
                for token, each in successors
                if len(path) < 3
            }
    best = sorted(every.values(), reverse=True)[:12]
    assert sorted(found.values(), reverse=True) == pytest.approx(best, abs=1e-5)
    for path, score in found.items():
        assert score == pytest.approx(every[path], abs=1e-5)
        assert path == () or path[:-1] in found


def test_a_beam_of_one_is_greedy(text):
    tokens = text(3000, 20).tolist()
    table = TrigramTable()
    table.add(tokens)
    drafter = BeamDrafter(table, depth=5, width=1, max_nodes=100, adapt=False)
    tree = drafter.draft(state(tokens[:2]))
    pair, deepest = tuple(tokens[:2]), max(paths(tree), key=len)
    assert len(deepest) == 5
    for token in deepest:
        assert token == next(iter(table.probs(*pair)))
        pair = pair[1], token


@pytest.mark.parametrize("drafter", [MCTSDrafter, BeamDrafter])
def test_bad_input_is_one_line(drafter):
    table = TrigramTable(vocab_size=10)
    for name in ("depth", "max_nodes"):
        with pytest.raises(ValueError, match=f"expected {name} .*1.*, got 0"):
            drafter(table, **{name: 0}).draft(state([1, 2]))
    with pytest.raises(ValueError, match="expected window >= 0, got -1"):
        drafter(table, window=-1)
    with pytest.raises(ValueError, match=r"expected token ids in \[0, 10\), got 12"):
        drafter(table).draft(state([1, 12]))
    with pytest.raises(ValueError, match="expected a context of at least one token, got none"):
        drafter(table).draft(state(torch.zeros(0, dtype=torch.long)))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (dict(iterations=0), r"expected iterations in \[1, 1048576\], got 0"),
        (dict(depth=64), r"expected depth in \[1, 63\], got 64"),
        (dict(keep=0), "expected keep >= 1, got 0"),
        (dict(c1=-1.0), "expected a finite c1 >= 0, got -1"),
        (dict(c2=0.0), "expected a finite c2 > 0, got 0"),
        (dict(c2=float("inf")), "expected a finite c2 > 0, got inf"),
    ],
)
def test_settings_of_the_search_are_checked(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        MCTSDrafter(TrigramTable(), **options)
