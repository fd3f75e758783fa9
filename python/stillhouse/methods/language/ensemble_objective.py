"""Several teachers in a trainer's loop: their rows, and the loss of them as an objective."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from stillhouse.methods.language.ensemble_weights import Weights, mixed
from stillhouse.train import LogitRows, reduce, row_divergence
from stillhouse.train.forward import FrozenTeacher


class TeacherEnsemble:
    """Several causal language models in a trainer's teacher's place: a list of their rows.

    They see the student's batch, are put into evaluation mode and never trained; they are to be on
    the training device. Raises ValueError for no model, and one without an output head.

    Defaults: none.

    Example:
        >>> from stillhouse.methods.language import TeacherEnsemble
        >>> TeacherEnsemble([])
        Traceback (most recent call last):
        ...
        ValueError: no teacher: an ensemble has at least one
    """

    def __init__(self, models: Sequence[nn.Module]):
        if not models:
            raise ValueError("no teacher: an ensemble has at least one")
        self.teachers = [FrozenTeacher(model) for model in models]

    def __call__(self, batch: Mapping[str, Any], index: Any) -> list[LogitRows]:
        return [teacher(batch, index) for teacher in self.teachers]


class EnsembleLoss:
    """`ensemble_kl` over the rows of a `TeacherEnsemble`, as an objective for `DistillTrainer`.

    label_weight: share of the cross-entropy to the labels. Beside `loss` the call returns `kl_k`,
    the mean KL to each teacher. The command line names one teacher, so this is for Python.
    Raises ValueError for a label_weight outside [0, 1] and as `ensemble_kl`.

    Defaults: temperature 2 and equal weights as `ensemble_kl`; label_weight 0.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import EnsembleLoss
        >>> from stillhouse.train import LogitRows, supervised_rows
        >>> index = supervised_rows(torch.tensor([[5, 3, 1, 2]]))
        >>> student = torch.zeros(3, 8, requires_grad=True)
        >>> teachers = [LogitRows(torch.eye(3, 8), index), LogitRows(torch.ones(3, 8), index)]
        >>> EnsembleLoss()(LogitRows(student * 1, index), teachers, {})["loss"].backward()
    """

    def __init__(
        self, weights: Weights = None, temperature: float = 2.0, *, label_weight: float = 0.0
    ):
        if not 0 <= label_weight <= 1:
            raise ValueError(f"label_weight is a share in [0, 1], got {label_weight}")
        self.weights, self.temperature, self.label_weight = weights, temperature, label_weight

    def __call__(
        self, student: LogitRows, teacher: Sequence[LogitRows], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        if not isinstance(teacher, Sequence) or not teacher:
            raise ValueError("an ensemble is a list of teachers' rows: pass a TeacherEnsemble")
        options = {"temperature": self.temperature, "return_stats": True}
        columns = {"vocab_size": batch.get("vocab_size")}
        found = [row_divergence(student, each, **options, **columns) for each in teacher]
        per_row = (1 - self.label_weight) * self.temperature**2 * mixed(found, self.weights)
        if self.label_weight > 0:
            labels = {"labels": student.index.target, **columns}
            hard = row_divergence(student, None, "cross_entropy", **labels)
            per_row = per_row + self.label_weight * hard
        means = {f"kl_{k}": reduce(each.detach()) for k, (each, _) in enumerate(found)}
        return {"loss": reduce(per_row, count=batch.get("denominator")), **means}
