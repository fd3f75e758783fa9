"""Trees of log-probabilities: against sorting everything, closed under parents, of one shape."""

import numpy as np
import pytest

from stillhouse.methods.speculative import DraftTree, dynamic_tree, expand_level, static_tree


def rows(*shape, seed=0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=shape)
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)


@pytest.mark.parametrize(("k", "width"), [(1, 1), (3, 4), (7, 28), (50, 5)])
def test_a_level_is_what_sorting_finds(k, width):
    log_probs, scores = rows(2, 4, 50), rows(2, 4, seed=1)
    level = expand_level(log_probs, scores, k, width=width)
    for b in range(2):
        best = np.argsort(-log_probs[b], axis=-1, kind="stable")[:, :k]
        assert (level.tokens[b] == best.ravel()).all()
        assert (level.parents[b] == np.repeat(np.arange(4), k)).all()
        sums = (scores[b][:, None] + np.take_along_axis(log_probs[b], best, -1)).ravel()
        np.testing.assert_array_equal(level.scores[b], sums)
        assert (level.frontier[b] == np.argsort(-sums, kind="stable")[:width]).all()


def test_ties_take_the_lower_token_and_what_cannot_be_is_never_taken():
    log_probs = np.float32([[[0, 2, 2, 1], [-np.inf, np.nan, -np.inf, -3], [5, 5, 5, 5]]])
    level = expand_level(log_probs, np.float32([[0, 0, -np.inf]]), 2, width=4)
    assert level.tokens.tolist() == [[1, 2, 3, -1, -1, -1]]
    assert level.parents.tolist() == [[0, 0, 1, -1, -1, -1]]
    assert level.scores.tolist() == [[2, 2, -3, -np.inf, -np.inf, -np.inf]]
    assert level.frontier.tolist() == [[0, 1, 2, -1]]


def candidates(batch, levels, width, k, seed):
    """All levels of a tree grown from random rows: tokens, parents, scores [B, N]."""
    tokens, parents = np.full((batch, 1), 9, np.int32), np.full((batch, 1), -1, np.int32)
    scores = np.zeros((batch, 1), np.float32)
    frontier, before = np.zeros((batch, 1), np.int32), scores
    for level in range(levels):
        grown = expand_level(
            rows(batch, frontier.shape[1], 30, seed=seed + level), before, k, width=width
        )
        begin = tokens.shape[1]
        tokens = np.concatenate([tokens, grown.tokens], 1)
        parents = np.concatenate([parents, np.take_along_axis(frontier, grown.parents, 1)], 1)
        scores = np.concatenate([scores, grown.scores], 1)
        frontier = grown.frontier + begin
        before = np.take_along_axis(grown.scores, grown.frontier, 1)
    return tokens, parents, scores


@pytest.mark.parametrize("total", [1, 2, 12, 60])
def test_the_best_of_all_levels_are_kept_with_their_parents(total):
    tokens, parents, scores = candidates(3, levels=4, width=4, k=4, seed=3)
    kept_tokens, kept_parents, kept_scores, chosen = dynamic_tree(
        tokens, parents, scores, total=total
    )
    for b in range(3):
        count = min(total, tokens.shape[1])
        best = np.sort(np.argsort(-scores[b], kind="stable")[:count])
        assert chosen[b][:count].tolist() == best.tolist()
        assert (kept_tokens[b][:count] == tokens[b][best]).all()
        assert (kept_scores[b][:count] == scores[b][best]).all()
        DraftTree.of(kept_tokens[b][:count], kept_parents[b][:count])  # checks the parents
        for node in range(1, count):
            assert best[kept_parents[b][node]] == parents[b][best[node]]
        assert (kept_parents[b][count:] == -2).all()
        assert (chosen[b][count:] == -1).all()


def test_a_child_never_goes_without_its_parent():
    """Scores that rise along a path, as no cumulative log-probability does."""
    tokens = np.int32([[0, 1, 2, 3]])
    parents, scores = np.int32([[-1, 0, 0, 1]]), np.float32([[0, -5, -1, -0.1]])
    for total, chosen in ((2, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])):
        assert dynamic_tree(tokens, parents, scores, total=total)[3].tolist() == [chosen]


def test_padding_and_impossible_nodes_are_left_out():
    tokens, parents = np.int32([[4, 5, 6, 7]]), np.int32([[-1, 0, 0, -2]])
    scores = np.float32([[0, -np.inf, -1, 3]])
    found = dynamic_tree(tokens, parents, scores, total=4)
    assert [part.tolist() for part in found[:2]] == [[[4, 6, 0, 0]], [[-1, 0, -2, -2]]]


def test_a_fixed_shape_takes_ranks():
    log_probs = rows(2, 3, 20, seed=5)
    paths = [(1,), (0,), (0, 0), (0, 2), (1, 0), (0, 2, 1)]
    tokens, parents, scores = static_tree(np.int32([3, 4]), log_probs, paths)
    assert parents.tolist() == [-1, 0, 0, 1, 1, 2, 4]
    order = [(), (0,), (1,), (0, 0), (0, 2), (1, 0), (0, 2, 1)]
    for b in range(2):
        ranked = np.argsort(-log_probs[b], axis=-1, kind="stable")
        assert tokens[b, 0] == (3, 4)[b]
        for node, path in enumerate(order[1:], 1):
            assert tokens[b, node] == ranked[len(path) - 1, path[-1]]
            ids = [ranked[depth, rank] for depth, rank in enumerate(path)]
            expected = sum(log_probs[b, depth, token] for depth, token in enumerate(ids))
            assert scores[b, node] == pytest.approx(expected, abs=1e-5)


def test_bad_input_is_one_line():
    log_probs = rows(1, 2, 5)
    zeros = np.zeros((1, 2), np.float32)
    with pytest.raises(ValueError, match=r"expected k in \[1, 5\], got 6"):
        expand_level(log_probs, zeros, 6, width=1)
    with pytest.raises(ValueError, match=r"expected width in \[1, 4\], got 5"):
        expand_level(log_probs, zeros, 2, width=5)
    with pytest.raises(ValueError, match=r"expected log_probs \[B, F, V\] and scores \[B, F\]"):
        expand_level(log_probs, zeros[:, :1], 2, width=1)
    with pytest.raises(TypeError):
        expand_level(log_probs.astype(np.float64), zeros, 2, width=1)
    root = np.int32([[1, 2]])
    with pytest.raises(ValueError, match=r"expected parents\[0\] = -1, .*, got 1 at node 1"):
        dynamic_tree(root, np.int32([[-1, 1]]), zeros, total=2)
    with pytest.raises(ValueError, match="got -2 at node 0"):
        dynamic_tree(root, np.int32([[-2, 0]]), zeros, total=2)
    with pytest.raises(ValueError, match="expected scores without NaN, got one at node 1"):
        dynamic_tree(root, np.int32([[-1, 0]]), np.float32([[0, np.nan]]), total=2)
    with pytest.raises(ValueError, match="expected total >= 1, got 0"):
        dynamic_tree(root, np.int32([[-1, 0]]), zeros, total=0)
    with pytest.raises(ValueError, match=r"expected the path \(0,\) that \(0, 1\) goes on from"):
        static_tree(np.int32([1]), log_probs, [(0, 1)])
    with pytest.raises(ValueError, match=r"expected each path once, got \(0,\) again"):
        static_tree(np.int32([1]), log_probs, [(0,), (0,)])
    with pytest.raises(ValueError, match=r"rows \(2\), got depth 3"):
        static_tree(np.int32([1]), log_probs, [(0,), (0, 0), (0, 0, 0)])
    with pytest.raises(ValueError, match=r"expected ranks in \[0, 5\), got 5"):
        static_tree(np.int32([1]), log_probs, [(5,)])
