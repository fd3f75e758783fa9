"""The examples in the docstrings of modules and of what methods share."""

import doctest
import importlib
import pkgutil

import pytest

import stillhouse.nn
import stillhouse.train

MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (stillhouse.nn, stillhouse.train)
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
