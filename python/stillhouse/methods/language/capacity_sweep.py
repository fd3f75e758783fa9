"""Every student size distilled from every teacher size: the points of the capacity-gap law."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.progress import Progress


def capacity_gap_sweep(
    teachers: Mapping[int, Any],
    sizes: Sequence[int],
    distill: Callable[[Any, int, int], Any],
    evaluate: Callable[[Any], float],
    *,
    seeds: Sequence[int],
    store: str | Path | None = None,
) -> list[dict[str, float]]:
    """Distil every student size from every teacher at least as large, with every seed.

    teachers: size -> whatever `distill` takes. sizes: of the students, counted in the same way.
    distill(teacher, size, seed) cuts a student out, trains it and returns it; evaluate(student) is
    a loss, smaller is better. store: a JSON file, rewritten after each run; runs that are in it are
    not repeated. Returns rows of `student`, `teacher` (sizes), `seed` and `loss`.
    Raises ValueError for fewer than 2 student sizes or 3 teachers of a size, a student larger than
    all teachers, and a loss that is not finite.

    Defaults: none.

    Example:
        >>> from stillhouse.methods.language import capacity_gap_sweep
        >>> rows = capacity_gap_sweep(
        ...     {4: "a", 8: "b", 16: "c"}, [2, 4], lambda teacher, size, seed: (teacher, size),
        ...     lambda student: 1.0 / student[1], seeds=[0],
        ... )
        >>> len(rows), rows[0]
        (6, {'student': 2, 'teacher': 4, 'seed': 0, 'loss': 0.5})
    """
    pairs = _pairs(list(teachers), list(sizes))
    runs = [(*pair, seed) for seed in seeds for pair in pairs]
    path = None if store is None else Path(store)
    rows: dict[tuple[int, ...], dict[str, float]] = {}
    if path is not None and path.exists():
        for row in json.loads(path.read_text()):
            rows[row["student"], row["teacher"], row["seed"]] = row
    progress = Progress("runs")
    for done, run in enumerate(runs):
        progress("capacity gap", done, len(runs))
        if run in rows:
            continue
        size, teacher, seed = run
        loss = float(evaluate(distill(teachers[teacher], size, seed)))
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss of student {size} of teacher {teacher}, seed {seed}, is {loss}"
            )
        rows[run] = {"student": size, "teacher": teacher, "seed": seed, "loss": loss}
        if path is not None:
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text(json.dumps(list(rows.values()), indent=1))
            os.replace(partial, path)
    return [rows[run] for run in runs]


def _pairs(teachers: list[int], sizes: list[int]) -> list[tuple[int, int]]:
    if len(set(sizes)) < 2:
        raise ValueError(f"a line needs at least 2 student sizes, got {sizes}")
    for size in sizes:
        larger = sum(teacher >= size for teacher in teachers)
        if larger < 3:
            raise ValueError(
                f"student {size} needs at least 3 teachers of its size or more, got {larger}"
            )
    return [(size, teacher) for size in sizes for teacher in sorted(teachers) if teacher >= size]
