"""The examples in the docstrings of what all drafters share; methods' own are of the catalog."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["generate", "language_model", "statistics"])
def test_examples_run(name):
    module = importlib.import_module(f"stillhouse.methods.speculative.{name}")
    assert doctest.testmod(module).failed == 0
