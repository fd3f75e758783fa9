"""Texts and trees that the tests of the drafters share."""

import numpy as np
import pytest


@pytest.fixture
def text():
    """`text(n, vocabulary, seed)`: n tokens, few of them often, as words are."""

    def make(n: int, vocabulary: int, seed: int = 0) -> np.ndarray:
        drawn = np.random.default_rng(seed).zipf(1.3, size=n)
        return (drawn % vocabulary).astype(np.int32)

    return make
