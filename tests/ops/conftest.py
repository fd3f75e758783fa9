"""Shared by the tests of the ops: every way that a kernel is run."""

import pytest
import torch

from stillhouse import ops


def _use(kernels, request):
    """The CUDA kernels on the executor or, with --device cuda, on a GPU with tensors there."""
    if kernels == "simt":
        request.getfixturevalue("simt")
    elif kernels == "cuda":
        request.getfixturevalue("on_cuda")


@pytest.fixture
def on_cuda():
    """Tensors are made on the GPU."""
    with torch.device("cuda"):
        yield


@pytest.fixture(params=["cpu", "cuda"], ids=lambda name: f"device-{name}")
def device(request):
    """Where tensors are made, for what is no kernel's own."""
    _use(request.param, request)
    return request.param


@pytest.fixture(params=["cpu", "simt", "cuda"], ids=lambda name: f"kernels-{name}")
def kernels(request):
    """The CPU's kernels, or those of CUDA."""
    _use(request.param, request)
    return request.param


@pytest.fixture(params=[*range(ops.cpu_level() + 1), "simt", "cuda"], ids=lambda n: f"level{n}")
def level(request):
    """An instruction set of the CPU, or the CUDA kernels."""
    if isinstance(request.param, str):
        _use(request.param, request)
        yield request.param
        return
    best = ops.cpu_level()
    ops.cpu_level(request.param)
    yield request.param
    ops.cpu_level(best)
