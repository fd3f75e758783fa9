"""Text on disk as records, and the split that keeps some of them for evaluation."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from stillhouse.data.packages import stdlib_docs

Record = dict[str, Any]

# A record is read by the first of these that its columns cover.
LAYOUTS = (("messages",), ("prompt", "response"), ("text",))
SUFFIXES = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}


def read(source: str | Path) -> Sequence[Record]:
    """Records of `source`, each with the columns `text`, `messages` or `prompt` and `response`.

    `source` is the word "stdlib-docs", a file (.txt, .md, .rst: one document; .jsonl, .json,
    .parquet: one record a row) or a folder: one that `datasets.save_to_disk` wrote, or one of such
    files. Raises FileNotFoundError where it does not exist and ValueError where it cannot be read,
    is empty or has other columns.
    """
    if str(source) == "stdlib-docs":
        return [{"text": text} for text in stdlib_docs()]
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"no data at {path}: expected a file, a folder or the built-in set stdlib-docs"
        )
    if path.is_dir() and any(
        (path / name).exists() for name in ("state.json", "dataset_dict.json")
    ):
        records = _saved_dataset(path)
    else:
        records = _files(path)
    if len(records) == 0:
        raise ValueError(f"{path} is empty: no document in it")
    columns = _columns(records)
    if layout(columns) is None:
        raise ValueError(
            f"{path} has the columns {', '.join(sorted(columns))}: expected text, messages, "
            "or prompt and response"
        )
    return records


def layout(columns: Collection[str]) -> tuple[str, ...] | None:
    """The columns that a record is read by, or None where there is no known set of them."""
    return next((each for each in LAYOUTS if set(each) <= set(columns)), None)


def holdout(records: Sequence[Record], share: float) -> tuple[list[int], list[int]]:
    """Numbers of the records for training and for evaluation: about `share` of the characters.

    The choice depends on the contents alone (documents in order of their SHA-256), so it is the
    same on every machine and in every order of the files, and equal documents stay together.
    Raises ValueError for a share outside [0, 1) and where a side would stay empty.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the held-out share must be in [0, 1), got {share}")
    everything = list(range(len(records)))
    if share == 0:
        return everything, []
    groups: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for number, record in enumerate(records):
        content = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str)
        digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
        groups.setdefault(digest, []).append(number)
        sizes[digest] = sizes.get(digest, 0) + len(content)
    if len(groups) < 2:
        raise ValueError(
            "the data is one document, and held-out text is split by document: give more "
            "documents, name other text with --eval_data, or switch it off with --eval_share 0"
        )
    wanted, held = share * sum(sizes.values()), set()
    for digest in sorted(groups):
        # A document that would take far more than the share stays in training.
        if sizes[digest] <= wanted and len(held) < len(groups) - 1:
            held.add(digest)
            wanted -= sizes[digest]
    if not held:
        # Every document is larger than the share: the smallest one is the nearest to it.
        held.add(min(groups, key=lambda digest: (sizes[digest], digest)))
    evaluation = sorted(number for digest in held for number in groups[digest])
    chosen = set(evaluation)
    return [number for number in everything if number not in chosen], evaluation


def _saved_dataset(path: Path) -> Sequence[Record]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the readers below raise anything from OSError to ArrowInvalid
        raise ValueError(f"cannot read the saved dataset {path}: {_first_line(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise ValueError(
                f"{path} holds the splits {', '.join(loaded)}: name one of its folders, "
                f"such as {path / next(iter(loaded), 'train')}"
            )
        loaded = loaded["train"]
    return loaded


def _files(path: Path) -> Sequence[Record]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    if not files:
        raise ValueError(f"{path} holds none of {' '.join(SUFFIXES)}")
    kinds = {SUFFIXES.get(file.suffix) for file in files}
    if None in kinds:
        raise ValueError(f"cannot read {path}: expected one of {' '.join(SUFFIXES)}")
    if len(kinds) > 1:
        raise ValueError(f"{path} mixes {' and '.join(sorted(kinds))} files: keep one kind")
    if kinds == {"text"}:
        return _plain_text(files)
    return _table(kinds.pop(), files)


def _plain_text(files: list[Path]) -> list[Record]:
    records = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file} is not UTF-8 text (byte {error.start}): convert it, or leave it out"
            ) from error
        if text.strip():
            records.append({"text": text})
    return records


def _table(kind: str, files: list[Path]) -> Sequence[Record]:
    """JSON lines or Parquet through `datasets`, which maps them into memory instead of loading."""
    import datasets

    empty = [file for file in files if file.stat().st_size == 0]
    if len(empty) == len(files):
        return []
    names = [str(file) for file in files if file not in empty]
    # What the readers raise is told below, in one line; they would print its traceback before.
    readers = logging.getLogger("datasets.packaged_modules")
    level = readers.level
    readers.setLevel(logging.CRITICAL)
    try:
        return datasets.load_dataset(kind, data_files=names, split="train")
    except Exception as error:
        # datasets wraps the reader's own complaint; that one says what is wrong with the file.
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"cannot read {', '.join(names)}: {_first_line(cause)}") from error
    finally:
        readers.setLevel(level)


def _columns(records: Sequence[Record]) -> set[str]:
    names = getattr(records, "column_names", None)
    return set(names if names is not None else records[0])


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
