"""Teachers that are not in memory: their stored distributions and features."""

from stillhouse.teachers.cache import TensorCache
from stillhouse.teachers.shard_format import ShardError
from stillhouse.teachers.shards import StoredRows, TeacherShards
from stillhouse.teachers.stored import StoredExamples, StoredTeacher

__all__ = [
    "ShardError",
    "StoredExamples",
    "StoredRows",
    "StoredTeacher",
    "TeacherShards",
    "TensorCache",
]
