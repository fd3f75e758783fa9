"""For families whose providers are calls without arguments, on tensors of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from .divergence import FLOOR
from .grid import Cell, Provider
from .measure import timed_calls


def runners(
    cell: Cell,
    providers: Iterable[Provider],
    device: str,
    build_floor: Callable[[Cell], Callable[[], None]],
) -> dict[str, Callable[[int], float]]:
    """The functions to time at a cell, and the floor."""
    with torch.device(device):
        found = {p.name: p.build(cell) for p in providers if p.refuses(cell) is None}
        found[FLOOR] = build_floor(cell)
    return timed_calls(found, device)


def memory_call(
    providers: Iterable[Provider], cell: Cell, name: str, threads: int, device: str
) -> tuple[Callable[[], object], int]:
    """For `measure.peak_memory`: the warmed-up call, and no gradient."""
    torch.set_num_threads(threads)
    with torch.device(device):
        call = next(p for p in providers if p.name == name).build(cell)
    call()
    return call, 0
