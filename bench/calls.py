"""For families whose providers are calls without arguments, on tensors of their own.

Such a family has no `runners` and no `memory_call` of its own: it names what its floor is,
`build_floor(cell)`, and, where a call computes more than one product, how many, `products(cell)`:
rows hold the time of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from types import ModuleType

import torch

from .divergence import FLOOR
from .grid import Cell, Provider
from .measure import timed_calls


def runners(
    family: ModuleType, cell: Cell, providers: Iterable[Provider], device: str
) -> dict[str, Callable[[int], float]]:
    """The functions to time at a cell, and the floor."""
    with torch.device(device):
        found = {p.name: p.build(cell) for p in providers if p.refuses(cell) is None}
        found[FLOOR] = family.build_floor(cell)
    products = getattr(family, "products", None)
    return timed_calls(found, device, products(cell) if products else 1)


def memory_call(
    family: str, cell: Cell, name: str, threads: int, device: str
) -> tuple[Callable[[], object], int]:
    """For `measure.peak_memory`: the warmed-up call, and no gradient. The family is a module's
    name, for a process of its own cannot be handed a module."""
    torch.set_num_threads(threads)
    with torch.device(device):
        call = next(p for p in import_module(family).PROVIDERS if p.name == name).build(cell)
    call()
    return call, 0
