"""Loads the compiled libraries, so that `torch.ops.stillhouse` is complete."""

from __future__ import annotations

import importlib.util

import torch


def _path_of(name: str) -> str | None:
    # Not `Path(__file__).parent`: in an editable install the libraries lie elsewhere.
    spec = importlib.util.find_spec(f"stillhouse.{name}")
    return spec.origin if spec else None


# Types of device that have kernels.
devices = {"cpu"}


def _load() -> None:
    cpu = _path_of("_cpu")
    if cpu is None:
        raise ImportError(
            "stillhouse._cpu is not built: install the package (pip install .), "
            "a bare source tree has no compiled library"
        )
    torch.ops.load_library(cpu)
    cuda = _path_of("_cuda")
    if cuda is not None and torch.version.cuda is not None:
        torch.ops.load_library(cuda)
        devices.add("cuda")


def cpu_level(level: int = -1) -> int:
    """Instruction-set level of the CPU kernels: 0 baseline, 1 AVX2, 2 AVX-512.

    The best level of the machine is chosen at load, or the one `STILLHOUSE_CPU` names. Passing a
    level switches to it, which tests use to cover every level in one process.

    Raises:
        RuntimeError: the machine does not have that level.
    """
    return torch.ops.stillhouse._cpu_level(level)


_load()
