"""Rows, reductions, objectives, stages and the trainer of language-model distillation."""

from typing import Any

from stillhouse.train.hooks import capture
from stillhouse.train.layers import layer_map
from stillhouse.train.objective import (
    DivergenceObjective,
    LogitRows,
    Objective,
    row_divergence,
    row_loss,
    row_means,
)
from stillhouse.train.reduce import reduce
from stillhouse.train.rows import RowIndex, paired, supervised_rows
from stillhouse.train.schedules import Schedule, ramp
from stillhouse.train.stages import Stage, run_stages

__all__ = [
    "DistillTrainer",
    "DivergenceObjective",
    "LogitRows",
    "Objective",
    "RowIndex",
    "Schedule",
    "Stage",
    "capture",
    "layer_map",
    "paired",
    "ramp",
    "reduce",
    "row_divergence",
    "row_loss",
    "row_means",
    "run_stages",
    "supervised_rows",
]


def __getattr__(name: str) -> Any:
    # The trainer needs transformers, which the rest of this package does without.
    if name == "DistillTrainer":
        try:
            from stillhouse.train.trainer import DistillTrainer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"DistillTrainer needs {error.name}: pip install 'stillhouse[train]'",
                name=error.name,
            ) from error
        return DistillTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
