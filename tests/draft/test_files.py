"""Files of the tables: what comes back, and that a damaged one is refused."""

import pytest
import torch

from stillhouse.methods.speculative import DraftState, MCTSDrafter, NGramDrafter, TrigramTable


@pytest.fixture
def table(text):
    made = TrigramTable(successors=5, step=0.1, cap=2.0, capacity=300, vocab_size=60)
    tokens = text(3000, 60)
    made.add(tokens)
    for i in range(0, 400, 8):
        made.update(tokens[i : i + 16])
    return made


def test_a_table_comes_back_as_it_was(table, tmp_path):
    path = tmp_path / "table"
    table.save(path)
    again = TrigramTable.load(path)
    assert len(again) == len(table) == 300
    pairs = [(a, b) for a in range(60) for b in range(60)]
    assert all(again.probs(*pair) == table.probs(*pair) for pair in pairs)
    # It goes on alike: same settings, same pair to forget, same outsider.
    for each in (table, again):
        each.update([1, 2, 58, 1, 2, 58, 57, 56])
        each.add([57, 57, 57, 3])
    assert all(again.probs(*pair) == table.probs(*pair) for pair in pairs)
    with pytest.raises(ValueError, match=r"in \[0, 60\), got 60"):
        again.add([60, 1, 2])
    state = DraftState(torch.tensor([0, 1, 2, 1]), seed=5)
    drafts = [MCTSDrafter(each, adapt=False).draft(state) for each in (table, again)]
    assert drafts[0].tokens.tolist() == drafts[1].tokens.tolist()
    again.save(path)  # over an earlier one
    assert [each.name for each in tmp_path.iterdir()] == ["table"]


def test_n_grams_come_back_as_they_were(text, tmp_path):
    drafter = NGramDrafter(longest=4, shortest=2, capacity=500, branches=3)
    for seed in range(8):
        drafter.add(text(100, 30, seed))
    path = tmp_path / "ngrams"
    drafter.save(path)
    again = NGramDrafter.load(path, branches=3)
    assert len(again) == len(drafter) == 500
    longest = 0
    for seed in range(20):
        state = DraftState(torch.from_numpy(text(20, 30, seed)))
        found, expected = again.draft(state), drafter.draft(state)
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.parents.tolist() == expected.parents.tolist()
        longest = max(longest, len(found))
    assert any(
        len(drafter.draft(DraftState(torch.from_numpy(text(20, 30, s))))) > 1 for s in range(9)
    )


@pytest.mark.parametrize("kind", [TrigramTable, NGramDrafter])
def test_each_changed_byte_and_each_length_is_noticed(kind, tmp_path):
    made = kind()
    made.add([1, 2, 3, 1, 2, 4])
    path = tmp_path / "file"
    made.save(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        if 12 <= place < 16:
            continue  # not used
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is corrupted|has version|is no") as raised:
            kind.load(path)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"is no|is corrupted: it has \d+ bytes of content"):
            kind.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="is corrupted: it has"):
        kind.load(path)


def test_what_the_checksum_does_not_catch_is_checked_too(tmp_path):
    """A file with a valid checksum whose content is wrong: another program's, or an attack."""
    made = TrigramTable()
    made.add([1, 2, 3])
    path = tmp_path / "file"
    made.save(path)
    header, content = path.read_bytes()[:32], bytearray(path.read_bytes()[32:])

    def write(place, value):
        changed = bytearray(content)
        changed[place : place + 4] = value.to_bytes(4, "little", signed=value < 0)
        state = 0xCBF29CE484222325
        for at in range(0, len(changed), 8):
            word = int.from_bytes(changed[at : at + 8].ljust(8, b"\0"), "little")
            state = (state ^ word) * 0x100000001B3 % 2**64
        path.write_bytes(header[:24] + state.to_bytes(8, "little") + changed)

    write(0, 12)  # as it is
    assert TrigramTable.load(path).probs(1, 2) == {3: 1.0}
    # successors, capacity, step, cap, vocabulary, pairs; then the pair, its sum, its successors
    for place, value, complaint in [
        (0, 0, "its settings are out of range"),
        (4, 0, "its settings are out of range"),
        (28, 2, "it ends too early"),
        (28, 0, "it goes on behind its end"),
        (32, -2, "a token is outside the vocabulary"),
        (48, 14, "a bigram has too many successors"),
        (52, -1, "a token is outside the vocabulary"),
        (56, 9, "the counts of a bigram exceed their sum"),
    ]:
        write(place, value)
        with pytest.raises(ValueError, match=f"is corrupted: {complaint}"):
            TrigramTable.load(path)


def test_a_file_of_the_other_kind_is_none_of_ours(tmp_path):
    TrigramTable().save(tmp_path / "table")
    NGramDrafter(capacity=10).save(tmp_path / "ngrams")
    with pytest.raises(ValueError, match="is no n-gram table"):
        NGramDrafter.load(tmp_path / "table")
    with pytest.raises(ValueError, match="is no tri-gram table"):
        TrigramTable.load(tmp_path / "ngrams")


def test_errors_of_the_system_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        TrigramTable.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="table"):
        TrigramTable().save(tmp_path / "no folder" / "table")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        TrigramTable().save(tmp_path / "folder")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]  # nothing half-written stays
