"""An objective and its teacher as the loss of a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.train.forward import FrozenTeacher, row_forward
from stillhouse.train.objective import Objective
from stillhouse.train.rows import supervised_rows


class Taught:
    """What `DistillTrainer` follows, for `run_stages`: `taught(model, batch)` is `objective` on the
    supervised rows of the model's forward and of the teacher's.

    teacher: a causal language model of the same vocabulary, frozen from now on and in evaluation
    mode, or a callable as for `train.fidelity`; None where the objective needs none. vocab_size:
    the columns that count. The objective's parameters, state and `update` are the stage's.
    Raises ValueError where the objective needs a teacher and there is none, and in the call for a
    batch without labels.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillhouse.train import DivergenceObjective, Stage, Taught, run_stages
        >>> def teacher(ids):
        ...     return torch.eye(8)[ids]
        >>> taught = Taught(DivergenceObjective("forward_kl"), teacher)
        >>> data = [{"input_ids": (ids := torch.arange(8)[None]), "labels": ids}]
        >>> history = run_stages(nn.Embedding(8, 8), [Stage("imitate", taught, 2, data=data)])
        >>> history[1]["loss"] < history[0]["loss"]
        True
    """

    def __init__(
        self,
        objective: Objective,
        teacher: nn.Module | Callable[[Tensor], Any] | None = None,
        *,
        vocab_size: int | None = None,
    ):
        self.needs_teacher = getattr(objective, "needs_teacher", True)
        if teacher is None and self.needs_teacher:
            raise ValueError(f"{type(objective).__name__} compares with a teacher: pass teacher=")
        self.objective, self.vocab_size = objective, vocab_size
        self._model: Any = None
        if getattr(teacher, "get_output_embeddings", lambda: None)() is not None:
            self._teacher = FrozenTeacher(teacher)
        else:
            if isinstance(teacher, nn.Module):
                teacher.eval().requires_grad_(False)
            self._teacher = row_forward(teacher)

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if "labels" not in batch:
            raise ValueError(f"a batch needs labels, this one has {', '.join(batch)}")
        if model is not self._model:
            self._model, self._rows = model, row_forward(model)
        if hasattr(self.objective, "use_student"):
            self.objective.use_student(model)  # each time: a stage may have changed it in place
        batch = {**batch, "vocab_size": self.vocab_size}
        index = supervised_rows(batch["labels"])
        teacher = None
        if self.needs_teacher:
            with torch.no_grad():
                teacher = self._teacher(batch, index)
        return self.objective(self._rows(batch, index), teacher, batch)

    def parameters(self) -> list[nn.Parameter]:
        """Those of the objective."""
        return list(getattr(self.objective, "parameters", list)())

    def update(self, stats: Mapping[str, float], step: int, total_steps: int) -> None:
        """Told to the objective after each step."""
        if hasattr(self.objective, "update"):
            self.objective.update(stats, step, total_steps)

    def state_dict(self) -> dict[str, Any]:
        """Of the objective; {} where it has none."""
        return getattr(self.objective, "state_dict", dict)()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of the objective."""
        if state:
            self.objective.load_state_dict(state)
