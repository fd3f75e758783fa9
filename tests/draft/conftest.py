"""Texts, and the paper's algorithm, for the tests of the drafters."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def text():
    """`text(n, vocabulary, seed)`: n tokens, few of them often, as words are."""

    def make(n: int, vocabulary: int, seed: int = 0) -> np.ndarray:
        drawn = np.random.default_rng(seed).zipf(1.3, size=n)
        return (drawn % vocabulary).astype(np.int32)

    return make


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """`reference.py` beside this file."""
    path = Path(__file__).with_name("reference.py")
    spec = importlib.util.spec_from_file_location("draft_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
