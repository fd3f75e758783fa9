"""Loaders of real data that is already on the machine; nothing here downloads."""

from stillhouse.data.catalogs import catalog_pairs
from stillhouse.data.debian import DebianPackage, debian_packages
from stillhouse.data.packages import DataUnavailable, digits, smollm2, stdlib_docs
from stillhouse.data.text import holdout, read

__all__ = [
    "DataUnavailable",
    "DebianPackage",
    "catalog_pairs",
    "debian_packages",
    "digits",
    "holdout",
    "read",
    "smollm2",
    "stdlib_docs",
]
