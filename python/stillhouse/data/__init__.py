"""Loaders of real data that is already on the machine; nothing here downloads."""

from stillhouse.data.packages import DataUnavailable, digits, smollm2, stdlib_docs
from stillhouse.data.text import holdout, read

__all__ = ["DataUnavailable", "digits", "holdout", "read", "smollm2", "stdlib_docs"]
