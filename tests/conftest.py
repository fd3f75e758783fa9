"""Shared by every test: no network, a fixed seed, the CUDA kernels on the CPU's executor."""

import os
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from stillhouse.ops import divergence_autograd, linear_divergence_autograd

# SIMT_LIBRARY names another build, such as the one with sanitizers.
SIMT = Path(os.environ.get("SIMT_LIBRARY", Path(__file__).parents[1] / "build/simt/_simt.so"))


def pytest_addoption(parser):
    words = "cuda: the tests of the ops on a GPU, too"
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help=words)


def pytest_collection_modifyitems(config, items):
    # To the CUDA kernels "resident" is what they choose anyway.
    left_out = ["levelsimt-resident", "levelcuda-resident"]
    if config.getoption("--device") != "cuda":
        left_out += ["levelcuda", "kernels-cuda", "device-cuda"]
    deselected = [item for item in items if any(word in item.nodeid for word in left_out)]
    config.hook.pytest_deselected(items=deselected)
    chosen = set(items) - set(deselected)
    items[:] = [item for item in items if item in chosen]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@cache
def _simt_ops():
    torch.ops.load_library(str(SIMT))
    divergence_autograd.register("stillhouse_simt")
    linear_divergence_autograd.register("stillhouse_simt")
    return torch.ops.stillhouse_simt


@pytest.fixture
def simt(monkeypatch):
    """Puts the CUDA kernels, run by the executor of tests/simt, in the place of the CPU's."""
    if not SIMT.exists():
        pytest.skip("the executor of tests/simt is not built (make test builds it)")
    monkeypatch.setattr(divergence_autograd, "_kernels", _simt_ops())
