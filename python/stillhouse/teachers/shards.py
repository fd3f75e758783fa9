"""Stored teachers: the top of a teacher's distribution at every supervised row of a data set.

Every example is read with its checksum, by offset: memory does not grow with the files, and one
that shrinks meanwhile is an error.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.teachers import fingerprints, packing
from stillhouse.teachers.shard_format import (
    MANIFEST,
    ForeignShard,
    Part,
    Schema,
    ShardError,
    bytes_after_header,
    columns_of,
    header,
    partial_path,
    read_manifest,
)


class StoredRows(NamedTuple):
    """A teacher at the n supervised rows of an example; as `ops.SparseTeacher` has them."""

    ids: Tensor  # int32 [n, k], -1 for no column
    log_probs: Tensor  # float32 [n, k], -inf for no column
    log_rest: Tensor  # float32 [n], of the other columns' mass


def write_shard(folder: Path, schema: Schema, part: Part, rows: Sequence[StoredRows]) -> None:
    """The shard's file, whole or not at all; `rows` are those of its examples, in their order."""
    pieces: dict[str, list[np.ndarray]] = {name: [] for name, _, _ in columns_of(schema)}
    sums = []
    for number, each in enumerate(rows, part.first):
        values, scale = packing.pack_values(each.log_probs, schema.values)
        packed = {
            "log_rest": each.log_rest.float().cpu().numpy(),
            "scale": scale,
            "values": values,
            "ids": packing.pack_ids(each.ids, schema.vocab_size),
        }
        sums.append(_checksum(number, [packed[name].tobytes() for name in pieces]))
        for name in pieces:
            pieces[name].append(packed[name])
    counts = [len(each.ids) for each in rows]
    if len(counts) != part.last - part.first or sum(counts) != part.rows:
        raise ValueError(f"{part.name} was planned for {part}, not for {counts}")
    path = folder / part.name
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            file.write(header(schema, part))
            file.write(np.cumsum([0, *counts], dtype="<i8").tobytes())
            file.write(np.array(sums, dtype="<i8").tobytes())
            for arrays in pieces.values():
                for array in arrays:
                    file.write(array.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _checksum(example: int, pieces: Sequence[bytes]) -> int:
    # With its number, so that no example stands in another one's place.
    value = zlib.crc32(example.to_bytes(8, "little"))
    for piece in pieces:
        value = zlib.crc32(piece, value)
    return value


class ShardFiles:
    """Shards of a schema in a folder, whether all of them are there or not."""

    def __init__(self, folder: Path, schema: Schema, parts: Sequence[Part]):
        self.folder, self.schema, self.parts = folder, schema, list(parts)
        self._starts = [each.first for each in self.parts]
        self._columns = columns_of(schema)
        self._id_bytes = packing.id_bytes(schema.k, schema.vocab_size)
        self._indices: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}

    def __len__(self) -> int:
        """Number of examples."""
        return self.schema.examples

    @property
    def row_count(self) -> int:
        """Supervised rows of all examples."""
        return sum(part.rows for part in self.parts)

    def check_file(self, part: Part) -> None:
        """Raise ShardError unless the file is there, has its size and the header it must have."""
        path, expected = self.folder / part.name, header(self.schema, part)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ShardError(f"{path} is missing: run the capture again") from error
        if not path.is_file():
            raise ShardError(f"{path} is no file")
        if _bytes(path, [(0, min(size, len(expected)))])[0] != expected:
            what = _difference(path, expected)
            raise ForeignShard(f"{path} is of another capture or damaged: {what}")
        whole = len(expected) + bytes_after_header(self.schema, part)
        if size != whole:
            raise ShardError(
                f"{path} is torn: {size} bytes instead of {whole}; run the capture again"
            )

    def verify(self, part: Part) -> None:
        """Raise ShardError unless every example of the shard has its checksum."""
        for example in range(part.first, part.last):
            self._read(example)
        del self._indices[part.number]

    def _index(self, part: Part) -> tuple[np.ndarray, np.ndarray, int]:
        """first_row and crc32 of a shard, and where its rows begin."""
        found = self._indices.get(part.number)
        if found is None:
            examples = part.last - part.first
            start, size = len(header(self.schema, part)), 8 * (2 * examples + 1)
            table = np.frombuffer(_bytes(self.folder / part.name, [(start, size)])[0], "<i8")
            first, sums = table[: examples + 1], table[examples + 1 :]
            counts = np.diff(first)
            outside = ((counts < 0) | (counts > self.schema.most_rows)).any()
            if first[0] != 0 or first[-1] != part.rows or outside:
                raise ShardError(f"{self.folder / part.name} is damaged: rows out of order")
            found = self._indices[part.number] = first, sums, start + size
        return found

    def _read(self, example: int) -> dict[str, bytes]:
        """An example's parts as they lie in the file."""
        if not 0 <= example < len(self):
            raise IndexError(f"example {example} of {len(self)}")
        part = self.parts[bisect_right(self._starts, example) - 1]
        first, sums, offset = self._index(part)
        at = example - part.first
        begin, end = int(first[at]), int(first[at + 1])
        names, places = [], []
        for name, width, size in self._columns:
            names.append(name)
            places.append((offset + begin * width * size, (end - begin) * width * size))
            offset += part.rows * width * size
        pieces = _bytes(self.folder / part.name, places)
        if _checksum(example, pieces) != int(sums[at]):
            raise ShardError(
                f"{self.folder / part.name} is damaged: the checksum of example {example} does "
                "not fit; run the capture again"
            )
        return dict(zip(names, pieces, strict=True))


class TeacherShards(ShardFiles):
    """The stored teacher of a folder that `stillhouse capture` has written.

    Args:
        folder: with `manifest.json` and the shards it names.
        verify: read every example once now and compare its checksum. Without it a damaged example
            is an error when training comes to it.
        progress: called meanwhile with what is read, the rows done and all rows, as
            `stillhouse.progress.Progress` is.

    Attributes:
        schema: what the rows are.

    Raises:
        ShardError: a shard that is missing, torn, damaged or of another capture.

    Example:
        >>> shards = TeacherShards("shards")  # doctest: +SKIP
        >>> shards.teacher(0).to_dense().shape  # doctest: +SKIP
        torch.Size([127, 49152])
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        verify: bool = True,
        progress: Callable[[str, int, int], object] = lambda what, done, total: None,
    ):
        super().__init__(Path(folder), *read_manifest(Path(folder) / MANIFEST))
        for part in self.parts:
            self.check_file(part)
        done = 0
        for part in self.parts if verify else ():
            self.verify(part)
            done += part.rows
            progress(f"checking {part.name}", done, self.row_count)

    def rows(self, example: int) -> StoredRows:
        """The teacher at an example's supervised rows, in their order.

        What rounding of the stored values adds to the mass of a row, or takes from it, is taken
        out again: known columns and the others have the sum 1, as they had. Raises IndexError for
        an example that is not there and ShardError for one that is damaged, or has an id outside
        the vocabulary or probabilities that do not sum to 1.
        """
        schema, pieces = self.schema, self._read(example)
        n = len(pieces["log_rest"]) // 4
        log_rest = torch.from_numpy(np.frombuffer(pieces["log_rest"], "<f4").copy())
        scale = np.frombuffer(pieces.get("scale", b""), "<f4").reshape(-1, 2).copy()
        dtype = {"exact": "<f4", "fp16": "<f2", "bf16": "<i2", "compact": "u1"}[schema.values]
        stored = np.frombuffer(pieces["values"], dtype).reshape(n, schema.k).copy()
        packed = np.frombuffer(pieces["ids"], np.uint8).reshape(n, self._id_bytes)
        try:
            ids, some_are_none = packing.unpack_ids(packed, schema.k, schema.vocab_size)
        except ValueError as error:
            raise ShardError(f"example {example} of {self.folder} is damaged: {error}") from error
        log_probs = packing.unpack_values(stored, scale, schema.values)
        if some_are_none:
            log_probs.masked_fill_(ids < 0, -torch.inf)
        mass = log_probs.exp().sum(-1).add_(log_rest.exp())
        # Not so of a NaN, either. The coarsest values are off by less than a tenth.
        if n and not float((mass - 1).abs_().max()) < (1e-3 if schema.values == "exact" else 0.2):
            raise ShardError(
                f"the probabilities of example {example} of {self.folder} do not sum to 1"
            )
        if schema.values != "exact":
            total = mass.log_()
            log_probs -= total[:, None]
            log_rest -= total
        return StoredRows(ids, log_probs, log_rest)

    def teacher(self, example: int, tail: str = "bucket") -> ops.SparseTeacher:
        """`rows` as a teacher that the ops take; `tail` as there."""
        rows, schema = self.rows(example), self.schema
        return ops.SparseTeacher(
            rows.ids, rows.log_probs, schema.vocab_size, schema.temperature, tail, rows.log_rest
        )

    def check(self, *, tokenizer: Any = None, examples: Sequence[Any] | None = None) -> None:
        """Raise ShardError unless this tokenizer, and these `train.examples.Example`s in this
        order, are what was captured."""
        schema = self.schema
        if tokenizer is not None and fingerprints.of_tokenizer(tokenizer) != schema.tokenizer:
            raise ShardError(
                f"{self.folder} was captured with another tokenizer: its ids mean other tokens"
            )
        if examples is None:
            return
        if len(examples) != len(self):
            raise ShardError(
                f"{self.folder} has {len(self)} examples, the data gives {len(examples)}: other "
                f"text, another held-out share or another --max_length than {schema.max_length}"
            )
        if fingerprints.of_examples(examples) != schema.data:
            raise ShardError(
                f"{self.folder} was captured from other tokens than this data gives: other text, "
                f"another order, or another --max_length than {schema.max_length}"
            )


def _bytes(path: Path, places: Sequence[tuple[int, int]]) -> list[bytes]:
    """So many bytes from each of these offsets."""
    try:
        with path.open("rb", buffering=0) as file:
            found = [os.pread(file.fileno(), size, offset) for offset, size in places]
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}") from error
    if any(len(got) != size for got, (_, size) in zip(found, places, strict=True)):
        raise ShardError(f"{path} is torn: it is shorter than its header says")
    return found


def _difference(path: Path, expected: bytes) -> str:
    """What a header that is not the expected one says otherwise, where it can be read at all."""
    try:
        (size,) = struct.unpack("<Q", _bytes(path, [(0, 8)])[0])
        if size > 4 * len(expected):
            return "its header cannot be read"
        found = json.loads(_bytes(path, [(8, size)])[0])["__metadata__"]
        wanted = json.loads(expected[8:])["__metadata__"]
        for name in wanted:
            if found.get(name) != wanted[name]:
                return f"its {name} is {str(found.get(name))[:70]}, not {wanted[name][:70]}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "its header cannot be read"
    return "its tensors have other sizes"
