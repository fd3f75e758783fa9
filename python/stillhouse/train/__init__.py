"""Rows, reductions, objectives, stages and the trainer of language-model distillation."""

from typing import Any

from stillhouse.train.calibration import ece, reliability
from stillhouse.train.drawing import Replay
from stillhouse.train.hooks import capture
from stillhouse.train.layers import layer_map
from stillhouse.train.logprobs import sequence_logprobs
from stillhouse.train.metrics import PowerLaw, fidelity, power_law_fit
from stillhouse.train.objective import (
    DivergenceObjective,
    LogitRows,
    Objective,
    row_divergence,
    row_loss,
    row_means,
)
from stillhouse.train.on_policy import AdaptiveShare, OnPolicy
from stillhouse.train.preference import preference_loss
from stillhouse.train.reduce import reduce
from stillhouse.train.response_source import ResponseSource
from stillhouse.train.responses import Responses, rollout
from stillhouse.train.rows import RowIndex, paired, supervised_rows
from stillhouse.train.schedules import Schedule, ramp
from stillhouse.train.stages import Stage, run_stages
from stillhouse.train.taught import Taught

__all__ = [
    "AdaptiveShare",
    "DistillTrainer",
    "DivergenceObjective",
    "LogitRows",
    "Objective",
    "OnPolicy",
    "PowerLaw",
    "Replay",
    "ResponseSource",
    "Responses",
    "RowIndex",
    "Schedule",
    "Stage",
    "Taught",
    "capture",
    "ece",
    "fidelity",
    "layer_map",
    "paired",
    "power_law_fit",
    "preference_loss",
    "ramp",
    "reduce",
    "reliability",
    "rollout",
    "row_divergence",
    "row_loss",
    "row_means",
    "run_stages",
    "sequence_logprobs",
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
