"""Stored teachers in training: examples that bring them along, and what stands for the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from stillhouse import ops
from stillhouse.teachers.shards import TeacherShards
from stillhouse.train.examples import STORED


class StoredExamples(Dataset):
    """Examples, each with its stored teacher: what a data loader of any order and any number of
    workers reads. Raises ShardError where `shards` were not captured from them."""

    def __init__(self, examples: Any, shards: TeacherShards):
        shards.check(examples=examples)
        self.examples, self.shards = examples, shards

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return replace(self.examples[index], teacher=self.shards.rows(index))


class StoredTeacher:
    """In a trainer's teacher's place: hands on what `StoredExamples` have brought in the batch."""

    def __init__(self, shards: TeacherShards, tail: str = "bucket"):
        if tail not in ops.SparseTeacher.TAILS:
            known = ", ".join(ops.SparseTeacher.TAILS)
            raise ValueError(f"tail must be one of {known}, got {tail!r}")
        self.schema, self.tail = shards.schema, tail

    def __call__(self, batch: Mapping[str, Any], index: Any) -> ops.SparseTeacher:
        """The rows of `index`. Raises ValueError for a batch that has brought other ones."""
        if STORED[0] not in batch:
            raise ValueError("the batch has no stored teacher: wrap the data in StoredExamples")
        ids, log_probs, log_rest = (batch[name] for name in STORED)
        if len(ids) != index.row.numel():
            raise ValueError(
                f"the batch has {index.row.numel()} supervised rows and {len(ids)} of its teacher"
            )
        schema = self.schema
        return ops.SparseTeacher(
            ids,
            log_probs,
            schema.vocab_size,
            schema.temperature,
            self.tail,
            log_rest,
            _trusted=True,  # ids and probabilities were looked at when they were read
        )
