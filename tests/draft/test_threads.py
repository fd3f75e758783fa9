"""One table, many threads: all at once, and the same draft whoever else is at work."""

from concurrent.futures import ThreadPoolExecutor

import torch

from stillhouse.methods.speculative import BeamDrafter, DraftState, MCTSDrafter, TrigramTable
from stillhouse.methods.speculative.ngram import NGramDrafter


def as_lists(tree):
    return tree.tokens.tolist(), tree.parents.tolist(), tree.scores.tolist()


def test_drafts_do_not_depend_on_the_number_of_threads(text):
    table = TrigramTable()
    tokens = text(20_000, 300)
    table.add(tokens)
    drafter = MCTSDrafter(table, keep=64, adapt=False)
    states = [DraftState(torch.from_numpy(tokens[i : i + 40]), seed=i) for i in range(300)]
    alone = [as_lists(drafter.draft(state)) for state in states]
    for threads in (2, 8):
        with ThreadPoolExecutor(threads) as pool:
            assert list(pool.map(lambda state: as_lists(drafter.draft(state)), states)) == alone


def test_threads_save_to_one_path(tmp_path):
    table = TrigramTable()
    table.add([1, 2, 3, 1, 2, 3])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: table.save(tmp_path / "table"), range(40)))
    assert TrigramTable.load(tmp_path / "table").probs(1, 2) == {3: 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["table"]


def test_threads_add_update_draft_and_save_at_once(text, tmp_path):
    """What was added is all there in the end, and every draft was a tree meanwhile."""
    table, ngrams = TrigramTable(successors=64, capacity=5000), NGramDrafter(capacity=5000)
    texts = [text(2000, 50, seed) for seed in range(8)]
    drafters = [MCTSDrafter(table), MCTSDrafter(table, adapt=False), BeamDrafter(table), ngrams]

    def work(seed):
        for i in range(0, 2000, 100):
            table.add(texts[seed][i : i + 100])
            ngrams.add(texts[seed][i : i + 100])
            for drafter in drafters:
                tree = drafter.draft(DraftState(torch.from_numpy(texts[seed][i : i + 60])))
                assert 1 <= len(tree) <= 64
        table.save(tmp_path / f"table{seed}")
        assert len(TrigramTable.load(tmp_path / f"table{seed}")) <= 5000
        assert table.nbytes > 0

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    counted = TrigramTable(successors=64, capacity=5000)
    for each in texts:
        for i in range(0, 2000, 100):
            counted.add(each[i : i + 100])
    assert len(table) == len(counted)  # what updates strengthen occurs in the texts
    shares = counted.probs(int(texts[0][0]), int(texts[0][1]))
    assert set(table.probs(int(texts[0][0]), int(texts[0][1]))) == set(shares)
    assert len(ngrams) == 5000


def test_a_small_table_forgets_while_others_read(text):
    """Entries are thrown out and their places used again under the readers' eyes."""
    table = TrigramTable(capacity=20)
    tokens = text(20_000, 100)
    drafter = MCTSDrafter(table)

    def work(seed):
        for i in range(seed, 4000, 40):
            for token in drafter.draft(DraftState(torch.from_numpy(tokens[i : i + 20]))).tokens:
                assert 0 <= token < 100
        return len(table)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(work, range(4))) == {20}
