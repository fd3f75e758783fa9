"""The tri-gram table: counts, online updates, what it keeps and forgets."""

import numpy as np
import pytest
import torch

from stillhouse.methods.speculative import TrigramTable

A, B, C, D = range(4)
TEXT = [A, B, C, A, B, D, A, B, C]


def test_counts_are_normalised_for_each_pair():
    table = TrigramTable()
    table.add(TEXT)
    assert table.probs(A, B) == {C: pytest.approx(2 / 3), D: pytest.approx(1 / 3)}
    assert table.probs(B, C) == {A: 1.0}
    assert table.probs(C, D) == {}
    assert len(table) == 5  # ab bc ca bd da


def test_texts_are_counted_together_but_not_across_their_ends():
    table = TrigramTable().build([[A, B, C], [A, B, D], torch.tensor([A, B, C])])
    assert table.probs(A, B) == {C: pytest.approx(2 / 3), D: pytest.approx(1 / 3)}
    assert len(table) == 1


def test_an_update_adds_a_step_for_each_occurrence_up_to_the_cap():
    table = TrigramTable()
    table.add(TEXT)
    table.update([A, B, C, A, B, C])
    assert table.probs(A, B)[C] == pytest.approx(2 / 3 + 0.08, abs=1e-12)
    assert table.probs(A, B)[D] == pytest.approx(1 / 3, abs=1e-12)
    for _ in range(100):
        table.update([A, B, D])
    assert table.probs(A, B)[D] == 3.0
    assert list(table.probs(A, B)) == [D, C]  # best first


def test_hits_beyond_the_cap_are_not_kept():
    table = TrigramTable(step=0.5, cap=1.2)
    table.add([A, B, C])
    for _ in range(10):
        table.update([A, B, C])  # 1 + 0.5 is above the cap after one
    assert table.probs(A, B) == {C: 1.2}
    table.build([[A, B, D]] * 3)
    assert table.probs(A, B) == {C: 0.25 + 0.5, D: 0.75}


def test_a_new_entry_starts_at_zero():
    table = TrigramTable(step=0.5, cap=1.2)
    table.update([A, B, C])
    assert table.probs(A, B) == {C: 0.5}
    table.update([A, B, C])
    table.update([A, B, C])
    assert table.probs(A, B) == {C: 1.2}


def test_a_pair_keeps_its_best_successors_and_of_equal_ones_the_lower_ids():
    table = TrigramTable(successors=3)
    table.add([x for c in (9, 7, 7, 5, 4, 8) for x in (A, B, c)])
    assert table.probs(A, B) == {7: 2 / 6, 4: 1 / 6, 5: 1 / 6}


def test_a_token_new_to_a_full_pair_can_rise():
    table = TrigramTable(successors=2)
    table.add([x for c in (4, 4, 5) for x in (A, B, c)])
    for times in range(1, 12):
        table.update([A, B, 9])
        assert (9 in table.probs(A, B)) == (times * 0.04 > 1 / 3)
    assert list(table.probs(A, B)) == [4, 9]


def test_the_pair_that_has_not_occurred_for_longest_is_forgotten():
    table = TrigramTable(capacity=3)
    table.add([1, 2, 3, 4, 5])  # 12 23 34
    table.update([1, 2, 9])
    table.update([7, 8, 9])
    assert len(table) == 3
    assert table.probs(2, 3) == {}
    assert all(table.probs(*pair) for pair in [(1, 2), (3, 4), (7, 8)])
    assert list(table.probs(1, 2)) == [3, 9]


@pytest.mark.parametrize("first", [[B, C, D], [C, D, A]])
def test_many_texts_at_once_forget_what_each_by_itself_would(first):
    """New pairs of a call push out the oldest, not those that occur later in the same call."""
    whole, each = TrigramTable(capacity=2), TrigramTable(capacity=2)
    for table in (whole, each):
        table.add([A, B, D])
        table.add(first)
    texts = [[A, B, C], [D, C, A], [A, B, C]]
    whole.build(texts)
    for text in texts:
        each.add(text)
    assert (
        whole.probs(A, B) == each.probs(A, B) == {C: pytest.approx(2 / 3), D: pytest.approx(1 / 3)}
    )
    assert whole.probs(D, C) == each.probs(D, C) == {A: 1.0}
    assert whole.probs(*first[:2]) == {}


@pytest.mark.parametrize("capacity", [10, 100, 1000])
def test_memory_is_bounded_whatever_comes(capacity, text):
    table = TrigramTable(capacity=capacity)
    table.add(text(20_000, 500))
    bound = table.nbytes
    for seed in range(1, 20):
        tokens = text(2000, 500, seed)
        table.add(tokens)
        for i in range(0, 1000, 8):
            table.update(tokens[i : i + 16])
        assert len(table) == capacity
    # 13 successors of 12 bytes, twice for spare room, three sizes of block that were outgrown.
    assert table.nbytes <= max(bound, 4096) + capacity * (13 * 12 * 2 * 4 + 2 * 64 + 4 * 16)


def test_the_hash_map_survives_any_order_of_coming_and_going(text):
    """A small table forgets all the time; what it knows is what the last occurrences left."""
    table, recent = TrigramTable(capacity=64), {}
    for i, (a, b, c) in enumerate(np.random.default_rng(0).integers(0, 12, (5000, 3)).tolist()):
        table.update([a, b, c])
        forgotten = sorted(recent.items(), key=lambda item: item[1])[: max(0, len(recent) - 63)]
        if (a, b) not in recent:
            for pair, _ in forgotten:
                del recent[pair]
        recent[a, b] = i
        if i % 50 == 0:
            known = {(x, y) for x in range(12) for y in range(12) if table.probs(x, y)}
            assert known == set(recent)


@pytest.mark.parametrize("successors", [1, 4, 12, 64])
def test_against_dictionaries(successors, text, reference):
    table, expected = TrigramTable(successors), reference.Table(successors)
    for seed in range(4):
        tokens = text(3000, 60, seed).tolist()
        table.add(tokens)
        expected.add(tokens)
        for i in range(0, 400, 4):
            table.update(tokens[i : i + 16])
            expected.update(tokens[i : i + 16])
        for pair in list(expected.pairs):
            found = expected.find(*pair)
            assert list(table.probs(*pair).items()) == [(c, pytest.approx(s)) for c, s in found]


def test_short_texts_have_no_trigram():
    table = TrigramTable()
    for tokens in ([], [1], [1, 2]):
        table.add(tokens)
        table.update(tokens)
    assert len(table) == 0


@pytest.mark.parametrize("method", ["add", "update"])
def test_token_ids_are_checked(method):
    call = getattr(TrigramTable(vocab_size=10), method)
    with pytest.raises(ValueError, match=r"expected token ids in \[0, 10\), got 10 at place 1"):
        call([1, 10, 2])
    with pytest.raises(ValueError, match=r"expected token ids in \[0, 10\), got -1 at place 2"):
        call([1, 2, -1])
    with pytest.raises(ValueError, match="expected token ids >= 0, got -7 at place 0"):
        getattr(TrigramTable(), method)([-7, 1, 2])
    with pytest.raises(ValueError, match="expected token ids below 2\\^31, got 4294967297"):
        call([1, 2, 2**32 + 1])
    with pytest.raises(TypeError, match="expected token ids to be integers, got float32"):
        call(torch.ones(3))
    with pytest.raises(ValueError, match=r"expected token ids \[n\], got 2 dimensions"):
        call(torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (dict(successors=0), r"expected successors in \[1, 64\], got 0"),
        (dict(step=0.0), "expected a finite step > 0, got 0"),
        (dict(step=float("nan")), "expected a finite step > 0, got nan"),
        (dict(cap=-1.0), "expected a finite cap > 0, got -1"),
        (dict(capacity=0), "expected capacity in .* bigrams, got 0"),
        (dict(vocab_size=0), r"expected vocab_size in \[1, 2\^31\), got 0"),
    ],
)
def test_settings_are_checked(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        TrigramTable(**options)
