import json

import pytest

from stillhouse.data import holdout, read

ROWS = [{"text": "one"}, {"text": "two"}]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_of_text_are_documents(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert read(tmp_path) == [{"text": "first"}, {"text": "second"}]
    assert read(tmp_path / "b.txt") == [{"text": "second"}]


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        [{"prompt": "a", "response": "b", "other": 1}],
        [{"messages": [{"role": "user", "content": "hi"}]}],
    ],
    ids=["text", "prompt", "messages"],
)
def test_tables(tmp_path, rows):
    datasets = pytest.importorskip("datasets")
    write_lines(tmp_path / "rows.jsonl", rows)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    for name in ("rows.jsonl", "rows.parquet", "saved", "splits"):
        assert list(read(tmp_path / name)) == rows, name


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("nowhere", None, FileNotFoundError, "no data at"),
        ("empty.txt", b"", ValueError, "is empty"),
        ("empty.jsonl", b"", ValueError, "is empty"),
        ("latin.txt", b"caf\xe9", ValueError, r"latin.txt is not UTF-8 text \(byte 3\)"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', ValueError, "cannot read .*broken.jsonl"),
        ("broken.parquet", b"PAR1 no more", ValueError, "cannot read .*broken.parquet"),
        ("other.jsonl", b'{"body": "a"}\n', ValueError, "has the columns body: expected text,"),
        ("image.png", b"x", ValueError, "expected one of .txt .md|expected one of .jsonl"),
        ("folder/", None, ValueError, "holds none of"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, error, message):
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_folder_of_two_kinds(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    write_lines(tmp_path / "b.jsonl", ROWS)
    with pytest.raises(ValueError, match="mixes json and text files"):
        read(tmp_path)


def test_holdout_is_by_content():
    records = [{"text": f"document {number} " * (20 + number % 5)} for number in range(50)]
    training, held = holdout(records, 0.2)
    assert sorted(training + held) == list(range(50))
    size = sum(len(records[number]["text"]) for number in held)
    assert 0.15 < size / sum(len(record["text"]) for record in records) < 0.21
    # In another order the same documents are held out.
    backwards = holdout(records[::-1], 0.2)[1]
    assert sorted(49 - number for number in backwards) == held
    assert holdout(records, 0) == (list(range(50)), [])


def test_equal_documents_stay_together():
    records = [{"text": f"document {number % 10}"} for number in range(40)]
    training, held = holdout(records, 0.3)
    assert held
    assert not {number % 10 for number in training} & {number % 10 for number in held}


def test_documents_larger_than_the_share():
    records = [{"text": "a" * 50}, {"text": "b" * 40}, {"text": "c" * 60}]
    assert holdout(records, 0.01) == ([0, 2], [1])


def test_what_cannot_be_split():
    with pytest.raises(ValueError, match="the data is one document"):
        holdout([{"text": "same"}, {"text": "same"}], 0.1)
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 1"):
        holdout(ROWS, 1)
