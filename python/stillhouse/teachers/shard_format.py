"""The format of stored teachers: what a manifest holds, and what a shard's bytes must be.

`docs/teacher-shards.md` describes it. A reader trusts nothing: a shard's header follows from the
manifest, byte for byte, so that none has to be parsed.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stillhouse.teachers import packing

FORMAT = "stillhouse teacher shards 1"
MANIFEST = "manifest.json"
_MOST_BYTES = 64 << 20  # of a manifest
_LARGEST = 1 << 40  # of any number in it
_LARGEST_EXAMPLE = 1 << 30  # bytes, which a reader has in memory at once


class ShardError(ValueError):
    """Stored teachers that are damaged, incomplete, or of something else; one line."""


class ForeignShard(ShardError):
    """A file whose header says that it is of something else."""


@dataclass(frozen=True)
class Schema:
    """What the rows of a capture are, the same in every shard. Raises ShardError for values that
    cannot be."""

    vocab_size: int
    k: int
    draws: int  # of the k columns, the last ones: drawn from all but the largest k - draws
    values: str  # of packing.VALUES
    temperature: float  # of the softmax that the log-probabilities are of
    max_length: int  # tokens of the longest example
    examples: int
    data: str  # fingerprints of the token stream, the tokenizer, the teacher
    tokenizer: str
    teacher: str
    teacher_name: str
    teacher_dtype: str
    stillhouse: str  # versions
    torch: str

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            wanted = {"int": int, "float": (int, float), "str": str}[str(each.type)]
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ShardError(f"{each.name} must be {each.type}, got {value!r:.60}")
        if not 1 <= self.vocab_size < 2**packing.MOST_BITS or not 1 <= self.k <= self.vocab_size:
            raise ShardError(f"k = {self.k} of {self.vocab_size} columns cannot be")
        if not 0 <= self.draws < self.k:
            raise ShardError(f"{self.draws} draws among {self.k} columns cannot be")
        if self.values not in packing.VALUES:
            known = ", ".join(packing.VALUES)
            raise ShardError(f"values must be one of {known}, got {self.values!r:.60}")
        if not 0 < self.temperature < float("inf"):
            raise ShardError(f"temperature must be a positive number, got {self.temperature}")
        if not 1 <= self.examples < _LARGEST or not 2 <= self.max_length < _LARGEST:
            raise ShardError(f"{self.examples} examples of {self.max_length} tokens cannot be")
        most = self.row_bytes * self.most_rows
        if most > _LARGEST_EXAMPLE:
            raise ShardError(
                f"{self.k} columns of {self.max_length} tokens may take {most} bytes, more than "
                f"the {_LARGEST_EXAMPLE} of an example: store fewer columns, or shorter examples"
            )

    @property
    def row_bytes(self) -> int:
        """What a row takes in a file, but for an example's 16 bytes."""
        return sum(width * size for _, width, size in columns_of(self))

    @property
    def most_rows(self) -> int:
        """Rows that an example has at most: its first token is nobody's target."""
        return self.max_length - 1


def columns_of(schema: Schema) -> list[tuple[str, int, int]]:
    """Name, elements a row and bytes an element of the parts of a row, in a file's order."""
    packed = packing.id_bytes(schema.k, schema.vocab_size)
    scale = [("scale", 2, 4)] if schema.values == "compact" else []
    values = ("values", schema.k, packing.BITS[schema.values] // 8)
    return [("log_rest", 1, 4), *scale, values, ("ids", packed, 1)]


class Part(NamedTuple):
    """One shard: examples `first` to `last` - 1, with so many rows together."""

    number: int
    first: int
    last: int
    rows: int

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}.safetensors"


def header(schema: Schema, part: Part) -> bytes:
    """The first bytes of a shard, its length included: a safetensors header."""
    examples, types = part.last - part.first, packing.VALUES[schema.values]
    entries = [("first_row", "I64", [examples + 1], 8), ("crc32", "I64", [examples], 8)]
    for name, width, size in columns_of(schema):
        dtype = {"values": types, "ids": "U8"}.get(name, "F32")
        shape = [part.rows] if name == "log_rest" else [part.rows, width]
        entries.append((name, dtype, shape, size))
    metadata = {"format": FORMAT} | {n: _text(value) for n, value in asdict(schema).items()}
    metadata |= {"shard": str(part.number), "first_example": str(part.first)}
    content: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, dtype, shape, size in entries:
        end = offset + size * int(np.prod(shape, dtype=object))
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(content, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def bytes_after_header(schema: Schema, part: Part) -> int:
    """Size of a shard's tensors."""
    return 8 * (2 * (part.last - part.first) + 1) + part.rows * schema.row_bytes


def partial_path(path: Path) -> Path:
    """A name for `path` until it is whole, which no other process on any machine takes."""
    return path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:16]}")


def write_manifest(folder: Path, schema: Schema, parts: Sequence[Part]) -> bool:
    """What makes a folder of shards a stored teacher, written when all of them are there. Returns
    whether it was this process that has written it: of several one is the first."""
    content = {
        "format": FORMAT,
        "schema": asdict(schema),
        "shards": [[each.first, each.last, each.rows] for each in parts],
    }
    content["crc32"] = zlib.crc32(_canonical(content))
    partial = partial_path(folder / MANIFEST)
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    try:
        os.link(partial, folder / MANIFEST)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        os.replace(partial, folder / MANIFEST)
        return True
    finally:
        partial.unlink(missing_ok=True)
    return True


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def read_manifest(path: Path) -> tuple[Schema, list[Part]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name comes twice")
        return dict(pairs)

    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        with path.open("rb") as file:
            read = file.read(_MOST_BYTES + 1)
        if len(read) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        content = json.loads(read, object_pairs_hook=unique)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        if content.pop("crc32", None) != zlib.crc32(_canonical(content)):
            raise ValueError("its checksum does not fit")
        schema = Schema(**content["schema"])
        parts = [Part(number, *each) for number, each in enumerate(content["shards"])]
        expected = 0
        for each in parts:
            if not all(type(x) is int and 0 <= x < _LARGEST for x in each):
                raise ValueError(f"{each.name} has sizes that cannot be")
            if each.first != expected or each.last <= each.first:
                raise ValueError(f"{each.name} does not go on where the one before ends")
            if each.rows > schema.most_rows * (each.last - each.first):
                raise ValueError(f"{each.name} has more rows than its examples have tokens")
            expected = each.last
        if expected != schema.examples:
            raise ValueError(f"its shards have {expected} of {schema.examples} examples")
    except FileNotFoundError as error:
        raise ShardError(
            f"no {MANIFEST} in {path.parent}: the capture is not finished (run it again), or the "
            "folder is another one"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ShardError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    return schema, parts
