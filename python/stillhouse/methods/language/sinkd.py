"""SinKD: the entropic transport cost between a batch's student and teacher distributions.

KL and its relatives say little where two distributions hardly overlap. Here the points are whole
rows: moving student row i to teacher row j costs the L1 distance of their probabilities, and the
plan is what Sinkhorn's iterations make of it, rows and then columns.

Equation, S = softmax(z / T), U = softmax(t / T) of b rows:

    D_ij = ||S_i - U_j||_1,   P = Sinkhorn(exp(-D / epsilon)) with marginals of ones
    L_SD = sum_ij P_ij D_ij
    L = (1 - alpha) CE + alpha CE(softmax(t / T_kd), softmax(z / T_kd)) + 0.001 beta L_SD

Paper: Sinkhorn Distance Minimization for Knowledge Distillation, LREC-COLING 2024,
arXiv 2402.17110. Code by its authors: 2018cx/SinKD.

**It is no loss of its own.** L_SD does not change when the teacher's rows are permuted: it does not
know which of them belongs to which student row. The other terms do. Nor is it 0 where S = U, the
plan being blurred (`debias`).

Where the code differs from the paper: the temperature of L_SD is 2 whatever is asked for; the
weight 0.8 is multiplied by 0.001, which the paper does not say; its scripts for language models
take the softmax over positions, which we read as an oversight: rows are tokens here, columns the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stillhouse.methods.language.sinkhorn_batch import sinkhorn_kd
from stillhouse.methods.language.sinkhorn_groups import rows_in_groups
from stillhouse.methods.language.sinkhorn_tokens import embedded_sinkhorn_kd, sample_sinkhorn_kd
from stillhouse.train import DivergenceObjective, LogitRows, ramp

__all__ = ["SinKDLoss", "embedded_sinkhorn_kd", "sample_sinkhorn_kd", "sinkhorn_kd"]


class SinKDLoss(DivergenceObjective):
    """Labels, soft cross-entropy and the Sinkhorn term, as an objective for `DistillTrainer`.

    The Sinkhorn term looks at `rows` evenly spaced rows of the batch, in groups of `group` (its
    value grows with a group's size, for which the weight was chosen), and at the columns that are
    among the teacher's `top` in one of them; all others count as one column, and the call reports
    the teacher's mass there as `dropped`. Beside `loss` it reports `sinkhorn`, and the statistics
    of student against teacher.

    alpha: share of the soft cross-entropy, the labels have the rest; no T^2 factor. beta: weight of
    the Sinkhorn term, times the code's factor 0.001. kd_temperature: of the soft cross-entropy;
    with `anneal` it goes to 1 in the course of the training. temperature, epsilon, iterations and
    debias as in `sinkhorn_kd`.
    Raises ValueError for numbers out of range.

    Defaults: alpha 0.9, beta 0.8, kd_temperature 2 (the scripts for GLUE use 0.8 to 1 and 1 to 4);
    groups of 32 (batches of 16 to 32); rows and top are ours, for vocabularies of language models.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import SinKDLoss
        >>> from stillhouse.train import LogitRows, supervised_rows
        >>> index = supervised_rows(torch.tensor([[5, 3, 1, 2]]))
        >>> student = torch.zeros(3, 8, requires_grad=True)
        >>> rows = LogitRows(student * 1, index), LogitRows(torch.eye(3, 8), index)
        >>> parts = SinKDLoss()(*rows, {})
        >>> parts["loss"].backward()
    """

    FACTOR = 0.001

    def __init__(
        self,
        alpha: float = 0.9,
        beta: float = 0.8,
        kd_temperature: float = 2.0,
        anneal: bool = False,
        *,
        temperature: float = 2.0,
        epsilon: float = 0.1,
        iterations: int = 20,
        debias: bool = False,
        rows: int = 128,
        group: int = 32,
        top: int = 64,
    ):
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is a share in [0, 1], got {alpha}")
        for name, number in (("beta", beta), ("kd_temperature", kd_temperature)):
            if not 0 <= number < float("inf") or (number == 0 and name != "beta"):
                raise ValueError(f"{name} must be a positive number, got {number}")
        if not rows >= group >= 2 or top < 1:
            raise ValueError(
                f"expected rows >= group >= 2 and top >= 1, got {rows}, {group}, {top}"
            )
        # Annealed as a tensor: a number that moves would recompile.
        self.first_temperature = kd_temperature
        moving = torch.tensor(kd_temperature, dtype=torch.float64)
        super().__init__("soft_cross_entropy", temperature=moving, label_weight=1 - alpha)
        self.sparse_tails, self.takes_draws = (), False  # distances are of whole rows
        self.beta, self.anneal = beta, anneal
        self.sampling = dict(rows=rows, group=group, top=top, temperature=temperature)
        # The rows are log-probabilities at `temperature` already.
        self.options = dict(temperature=1.0, epsilon=epsilon, iterations=iterations, debias=debias)

    def __call__(
        self, student: LogitRows, teacher: LogitRows, batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        if not isinstance(teacher, LogitRows):
            found = type(teacher).__name__
            raise ValueError(f"SinKD compares whole rows: it needs a teacher's logits, got {found}")
        # First: the loss may write its gradient over logits that the rows were given.
        groups = rows_in_groups(student, teacher, batch.get("vocab_size"), **self.sampling)
        term = groups.student.sum()  # of no group: a 0 with a gradient
        if len(groups.student):
            term = sinkhorn_kd(groups.student, groups.teacher, **self.options)
        parts = super().__call__(student, teacher, batch)
        weight = self.beta * self.FACTOR
        if batch.get("denominator") is not None:
            # A mean over the step's rows, as the other terms are.
            weight = weight * len(student) / batch["denominator"]
        return parts | {
            "loss": parts["loss"] + weight * term,
            "sinkhorn": term.detach(),
            "dropped": groups.dropped,
        }

    def update(self, stats: Mapping[str, float], step: int, total_steps: int) -> None:
        """Move the temperature after optimiser step `step` of `total_steps`, if it is annealed."""
        if self.anneal:
            self.temperature.fill_(ramp(step, total_steps, self.first_temperature, 1.0))

    def state_dict(self) -> dict[str, float]:
        """Where an annealed temperature is."""
        return {"kd_temperature": self.temperature.item()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.temperature.fill_(state["kd_temperature"])
