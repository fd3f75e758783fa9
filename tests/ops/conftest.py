"""Shared by the tests of the ops: every way that a kernel is run without a GPU."""

import pytest

from stillhouse import ops


@pytest.fixture(params=[*range(ops.cpu_level() + 1), "simt"], ids=lambda n: f"level{n}")
def level(request):
    """An instruction set of the CPU, or the CUDA kernels on the executor of tests/simt."""
    if request.param == "simt":
        request.getfixturevalue("simt")
        yield "simt"
        return
    best = ops.cpu_level()
    ops.cpu_level(request.param)
    yield request.param
    ops.cpu_level(best)
