"""Small captures, made without a model."""

import numpy as np
import pytest
import torch

from stillhouse import ops
from stillhouse.teachers import StoredRows, TeacherShards
from stillhouse.teachers.shard_format import Part, Schema, write_manifest
from stillhouse.teachers.shards import write_shard


@pytest.fixture(scope="session")
def schema():
    """schema(**changes): of five examples over 300 columns."""

    def make(**changes):
        options = dict(
            vocab_size=300,
            k=6,
            draws=0,
            values="exact",
            temperature=1.0,
            max_length=16,
            examples=5,
            data="d" * 64,
            tokenizer="t" * 64,
            teacher="m" * 64,
            teacher_name="a teacher",
            teacher_dtype="float32",
            stillhouse="0.1.0",
            torch="2.13.0",
        )
        return Schema(**(options | changes))

    return make


@pytest.fixture(scope="session")
def stored(schema):
    """stored(folder, **changes): writes a capture of random logits; returns their rows by example,
    as `ops.SparseTeacher.from_logits` has them."""

    def make(folder, counts=(3, 0, 4, 1, 2), per_shard=2, seed=0, times=1, **changes):
        chosen = schema(examples=times * len(counts), **changes)
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for count in counts:
            logits = 4 * torch.randn(count, chosen.vocab_size, generator=generator)
            top = ops.SparseTeacher.from_logits(logits, k=chosen.k, temperature=chosen.temperature)
            rows.append(StoredRows(top.ids, top.log_probs, top.log_rest))
        rows, counts = times * rows, times * counts
        folder.mkdir(parents=True, exist_ok=True)
        parts = []
        for first in range(0, len(counts), per_shard):
            last = min(first + per_shard, len(counts))
            parts.append(Part(len(parts), first, last, int(np.sum(counts[first:last]))))
            write_shard(folder, chosen, parts[-1], rows[first:last])
        (folder / "manifest.json").unlink(missing_ok=True)
        write_manifest(folder, chosen, parts)
        return rows

    return make


@pytest.fixture
def write_one(schema):
    """write_one(folder, rows, **changes): the capture of a single example."""

    def make(folder, rows, **changes):
        count, k = rows.ids.shape
        chosen = schema(k=k, examples=1, max_length=count + 1, **changes)
        part = Part(0, 0, 1, count)
        write_shard(folder, chosen, part, [rows])
        (folder / "manifest.json").unlink(missing_ok=True)
        assert write_manifest(folder, chosen, [part])
        return TeacherShards(folder)

    return make
