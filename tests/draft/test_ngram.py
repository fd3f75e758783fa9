"""Prompt lookup: which match decides, what it drafts, and what a full table forgets."""

import numpy as np
import pytest
import torch

from stillhouse import _draft
from stillhouse.methods.speculative import DraftState, NGramDrafter


def drafted(drafter, tokens) -> list[int]:
    tree = drafter.draft(DraftState(torch.as_tensor(tokens)))
    assert (tree.kind == 2).all()
    return tree.tokens.tolist()[1:]


def test_the_longest_match_decides_and_then_the_most_recent():
    context = [1, 2, 3, 7, 2, 3, 8, 9, 3, 6, 1, 2, 3]
    assert drafted(NGramDrafter(longest=3, length=1), context) == [7]
    assert drafted(NGramDrafter(longest=2, length=1), context) == [8]
    assert drafted(NGramDrafter(longest=1, length=1), context) == [6]
    tree = NGramDrafter(longest=3, length=1, branches=9).draft(DraftState(torch.tensor(context)))
    assert tree.tokens.tolist() == [3, 7, 8, 6]
    assert tree.parents.tolist() == [-1, 0, 0, 0]
    assert tree.scores.tolist() == [0, 3, 2, 1]


def test_a_period_goes_on_behind_the_contexts_end():
    assert drafted(NGramDrafter(length=7), [5, 6, 7, 5, 6, 7]) == [5, 6, 7, 5, 6, 7, 5]
    assert drafted(NGramDrafter(length=4), [9, 5, 5]) == [5, 5, 5, 5]


def test_the_shortest_match_that_counts():
    context = [1, 2, 3, 4, 3]
    assert drafted(NGramDrafter(shortest=1, length=1), context) == [4]
    assert drafted(NGramDrafter(longest=3, shortest=2, length=1), context) == []
    assert drafted(NGramDrafter(), [1, 2, 3]) == []
    assert drafted(NGramDrafter(), [1]) == []


def test_the_context_comes_before_earlier_texts_of_the_same_length():
    drafter = NGramDrafter(longest=2, length=2)
    drafter.add([1, 2, 3, 4])
    assert drafted(drafter, [9, 1, 2]) == [3, 4]
    assert drafted(drafter, [1, 2, 5, 1, 2]) == [5, 1]
    assert drafted(drafter, [7, 2, 5, 1, 2]) == [3, 4]  # longer, though not in the context
    drafter.add([1, 2, 8, 8])
    assert drafted(drafter, [9, 1, 2]) == [8, 8]  # the most recent text


def test_a_match_does_not_reach_from_one_text_into_the_next():
    drafter = NGramDrafter(longest=2, shortest=2, length=5)
    drafter.add([1, 2])
    drafter.add([3, 4])
    assert drafted(drafter, [1, 2]) == []
    assert drafted(drafter, [2, 3]) == []


def longest_match(texts, context, longest, shortest):
    """Continuations of the longest n-gram by brute force, most recent first."""
    for n in range(min(longest, len(context)), shortest - 1, -1):
        tail = context[-n:]
        found = [
            context[i + n :]
            for i in range(len(context) - n - 1, -1, -1)
            if context[i : i + n] == tail
        ]
        for text in reversed(texts):
            places = range(len(text) - n, -1, -1)
            found += [text[i + n :] for i in places if text[i : i + n] == tail]
        found = [each for each in found if each]
        if found:
            return n, found
    return 0, []


@pytest.mark.parametrize("vocabulary", [3, 12, 60])
def test_against_brute_force(vocabulary):
    random = np.random.default_rng(vocabulary)
    texts = [random.integers(0, vocabulary, 40).tolist() for _ in range(5)]
    drafter = NGramDrafter(longest=4, shortest=1, length=1)
    for text in texts:
        drafter.add(text)
    for _ in range(200):
        context = random.integers(0, vocabulary, random.integers(1, 20)).tolist()
        n, found = longest_match(texts, context, 4, 1)
        tree = drafter.draft(DraftState(torch.tensor(context)))
        assert tree.tokens.tolist()[1:] == [each[0] for each in found[:1]]
        assert tree.scores.tolist()[1:] == [n] * min(1, len(found))


def test_a_full_table_forgets_its_oldest_tokens_and_stays_right():
    random = np.random.default_rng(0)
    drafter, everything = NGramDrafter(longest=3, shortest=3, length=1, capacity=100), []
    size = drafter.nbytes
    for _ in range(40):
        text = random.integers(0, 4, random.integers(1, 30)).tolist()
        drafter.add(text)
        everything += [-1, *text]
        assert len(drafter) == min(100, len(everything))
        ring = everything[-100:]
        for _ in range(5):
            tail = random.integers(0, 4, 3).tolist()
            places = [i for i in range(len(ring) - 3) if ring[i : i + 3] == tail]
            after = [ring[i + 3] for i in reversed(places) if ring[i + 3] >= 0]
            assert drafted(drafter, tail) == after[:1]
    drafter.add(range(1000))  # longer than the table
    assert drafted(drafter, [996, 997, 998]) == [999]
    assert drafted(drafter, [10, 11, 12]) == []
    assert drafter.nbytes == size


def test_branches_share_their_beginnings_and_the_budget_holds():
    drafter = NGramDrafter(longest=1, length=3, branches=4)
    for text in ([1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 5, 7], [1, 8, 9, 9]):
        drafter.add(text)
    tree = drafter.draft(DraftState(torch.tensor([1])))
    assert tree.tokens.tolist() == [1, 8, 2, 9, 5, 3, 9, 7, 6, 4]
    assert tree.parents.tolist() == [-1, 0, 0, 1, 2, 2, 3, 4, 4, 5]
    drafter.max_nodes = 4
    assert len(drafter.draft(DraftState(torch.tensor([1])))) == 4


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match="expected 1 <= shortest <= longest <= 16, got 3 and 2"):
        NGramDrafter(longest=2, shortest=3)
    with pytest.raises(ValueError, match="expected 1 <= shortest <= longest <= 16, got 1 and 17"):
        NGramDrafter(longest=17)
    with pytest.raises(ValueError, match="expected capacity in .* tokens, got 1"):
        NGramDrafter(capacity=1)
    for name in ("length", "branches", "max_nodes"):
        with pytest.raises(ValueError, match=f"expected {name} >= 1, got 0"):
            NGramDrafter(**{name: 0})
    with pytest.raises(ValueError, match="expected token ids >= 0, got -1 at place 1"):
        NGramDrafter().add([1, -1])
    with pytest.raises(ValueError, match="expected a context of at least one token, got none"):
        NGramDrafter().draft(DraftState(torch.zeros(0, dtype=torch.long)))
    with pytest.raises(TypeError):
        _draft.NGramTable(1, 2, 10).add(np.zeros(3))
