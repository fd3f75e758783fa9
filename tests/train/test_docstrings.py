"""The examples of the shared pieces run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name", ["logprobs", "metrics", "preference", "response_source", "responses", "taught"]
)
def test_examples_run(name):
    outcome = doctest.testmod(importlib.import_module(f"stillhouse.train.{name}"))
    assert outcome.failed == 0
    assert outcome.attempted > 0
