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

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.train import DivergenceObjective, LogitRows, ramp

Cost = str | Callable[[Tensor, Tensor], Tensor]


def sinkhorn_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
    cost: Cost = "l1",
    debias: bool = False,
    normalize: str | None = None,
    gradient: str = "unrolled",
) -> Tensor:
    """sum_ij P_ij D_ij between the rows of a batch: the batch-wise form, which the paper ends with.

    student_logits, teacher_logits: [b, C], or [G, b, C] for G batches, whose mean is taken; any
    float dtype. cost: "l1" or "l2" distance of probabilities, or a function of S [G, b, C] and U
    that gives [G, b, b]. debias: less half of the same between S and S, and U and U: 0 for S = U.
    normalize: "mass" divides by b, with which the value grows. gradient as in `ops.sinkhorn`.
    Returns a float32 scalar (float64 for float64 logits). Raises ValueError for shapes that do not
    match, an unknown cost or normalize, and a teacher that requires a gradient. Warns of a single
    row, where the plan has no choice and the loss is the plain distance.

    Defaults: temperature 2, epsilon 0.1, 20 iterations, L1 (paper and code).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import sinkhorn_kd
        >>> student = torch.zeros(2, 3, requires_grad=True)
        >>> loss = sinkhorn_kd(student, torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
        >>> loss.backward()
        >>> round(loss.item(), 4)
        1.8146
    """
    _check(student_logits, teacher_logits, same_classes=True)
    if normalize not in (None, "mass"):
        raise ValueError(f"normalize must be None or 'mass', got {normalize!r}")
    if not (callable(cost) or cost in ("l1", "l2")):
        raise ValueError(f"cost must be 'l1', 'l2' or a function, got {cost!r}")
    rows = student_logits.shape[-2]
    if rows == 1:
        warnings.warn("a batch of one row: its plan has no choice", stacklevel=2)
    student, teacher = (
        _probabilities(x if x.dim() == 3 else x[None], temperature)
        for x in (student_logits, teacher_logits)
    )

    def value(x: Tensor, y: Tensor) -> Tensor:
        distance = cost(x, y) if callable(cost) else _DISTANCES[cost](x, y)
        options = dict(iterations=iterations, gradient=gradient, return_plan=False)
        return ops.sinkhorn(distance, epsilon, **options).value.mean()

    loss = value(student, teacher)
    if debias:
        loss = loss - 0.5 * (value(student, student) + value(teacher, teacher))
    return loss / rows if normalize == "mass" else loss


def sample_sinkhorn_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
    gradient: str = "unrolled",
) -> Tensor:
    """The sample-wise form that came before: within each row, the probabilities themselves are the
    points, and moving class k's to class l's costs |s_k - u_l|. Mean over rows.

    student_logits [..., C], teacher_logits [..., C'] of the same rows. The vocabularies may differ:
    the shorter one is continued by probabilities of 0, and with epsilon -> 0 this is the divergence
    `ops.ULD` of sorted rows. No [C, C'] costs are stored. Returns a scalar as `sinkhorn_kd` does.
    Raises ValueError for other rows and a teacher that requires a gradient.

    Defaults: as `sinkhorn_kd`; the authors' code has no such form (our reading of the paper).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import sample_sinkhorn_kd
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, 0.0, 0.0, 0.0]])
        >>> round(sample_sinkhorn_kd(student, teacher, epsilon=0.001).item(), 3)
        1.0
    """
    _check(student_logits, teacher_logits, same_classes=False)
    student = _probabilities(student_logits, temperature).flatten(0, -2)
    teacher = _probabilities(teacher_logits, temperature).flatten(0, -2)
    classes = max(student.shape[-1], teacher.shape[-1])
    points = [
        torch.nn.functional.pad(x, (0, classes - x.shape[-1]))[..., None]
        for x in (student, teacher)
    ]
    options = dict(cost="l1", iterations=iterations, gradient=gradient)
    return ops.sinkhorn_points(*points, epsilon, **options).value.mean()


def embedded_sinkhorn_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    *,
    top: int = 32,
    temperature: float = 1.0,
    epsilon: float = 0.1,
    iterations: int = 50,
) -> tuple[Tensor, Tensor]:
    """Transport between what two vocabularies say, row by row, along the distances of tokens.

    student_logits [..., V], teacher_logits [..., V'], embeddings [V, d] and [V', d] of the two
    vocabularies in one space (of the detokenised strings, say; no gradient flows to them). Of each
    row the `top` most probable tokens of either side are kept and scaled to mass 1: marginals of a
    transport problem whose costs are 1 - cosine of the embeddings. The gradient goes to the
    student's probabilities as marginals, by the fixed point.
    Returns the mean value and the mean mass that the student's side leaves out, both scalars.
    Raises ValueError for shapes that do not match.

    Defaults: ours; the paper keeps to one vocabulary.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import embedded_sinkhorn_kd
        >>> tokens = torch.eye(4)
        >>> student = torch.zeros(1, 4, requires_grad=True)
        >>> teacher = torch.tensor([[5.0, 0.0, 0.0]])
        >>> loss, left_out = embedded_sinkhorn_kd(student, teacher, tokens, tokens[:3])
        >>> loss.backward()
        >>> bool(student.grad[0, 0] < 0 < student.grad[0, 3])
        True
    """
    _check(student_logits, teacher_logits, same_classes=False)
    sides = []
    for logits, embeddings in (
        (student_logits, student_embeddings),
        (teacher_logits, teacher_embeddings),
    ):
        if embeddings.dim() != 2 or embeddings.shape[0] != logits.shape[-1]:
            raise ValueError(
                f"embeddings must be [{logits.shape[-1]}, d], a row a column of the logits, got "
                f"{tuple(embeddings.shape)}"
            )
        p = _probabilities(logits.flatten(0, -2), temperature)
        mass, ids = p.topk(min(top, p.shape[-1]), -1)
        total = mass.sum(-1, keepdim=True)
        unit = torch.nn.functional.normalize(embeddings.detach().to(mass.dtype), dim=-1)
        sides.append((mass / total, unit[ids], 1 - total))
    (a, x, left_out), (b, y, _) = sides
    distance = (1 - x @ y.mT).clamp(min=0)
    options = dict(a=a, b=b, iterations=iterations, gradient="implicit", return_plan=False)
    return ops.sinkhorn(distance, epsilon, **options).value.mean(), left_out.mean().detach()


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
        self.rows, self.group, self.top = rows, group, top
        self.options = dict(
            temperature=temperature, epsilon=epsilon, iterations=iterations, debias=debias
        )

    def __call__(
        self, student: LogitRows, teacher: LogitRows, batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        if not isinstance(teacher, LogitRows):
            found = type(teacher).__name__
            raise ValueError(f"SinKD compares whole rows: it needs a teacher's logits, got {found}")
        # First: the loss may write its gradient over logits that the rows were given.
        term, dropped = self._sinkhorn(student, teacher, batch.get("vocab_size"))
        parts = super().__call__(student, teacher, batch)
        weight = self.beta * self.FACTOR
        if batch.get("denominator") is not None:
            # A mean over the step's rows, as the other terms are.
            weight = weight * len(student) / batch["denominator"]
        return parts | {
            "loss": parts["loss"] + weight * term,
            "sinkhorn": term.detach(),
            "dropped": dropped,
        }

    def _sinkhorn(
        self, student: LogitRows, teacher: LogitRows, columns: int | None
    ) -> tuple[Tensor, Tensor]:
        every = -(-len(student) // self.rows) or 1
        sampled = slice(None, None, every)
        # Copies: the two terms of the loss must not share what one of them writes over.
        own = student.part(sampled).logits[:, :columns].clone()
        with torch.no_grad():
            other = teacher.part(sampled).logits[:, :columns]
            p = torch.softmax(other.float() / self.options["temperature"], -1)
            ids = p.topk(min(self.top, p.shape[-1]), -1).indices.unique()
            dropped = (1 - p[:, ids].sum(-1)).mean() if len(p) else p.sum()
        groups = len(own) // self.group
        if groups == 0:
            return own.sum() * 0.0, dropped
        kept = groups * self.group
        # With all others as one more column rows stay distributions.
        pair = [_projected(x[:kept], ids, self.options["temperature"]) for x in (own, other)]
        pair = [x.view(groups, self.group, -1) for x in pair]
        return sinkhorn_kd(*pair, **(self.options | {"temperature": 1.0})), dropped

    def update(self, stats: Mapping[str, float], step: int, total_steps: int) -> None:
        """Move the temperature after optimiser step `step` of `total_steps`, if it is annealed."""
        if self.anneal:
            self.temperature.fill_(ramp(step, total_steps, self.first_temperature, 1.0))

    def state_dict(self) -> dict[str, float]:
        """Where an annealed temperature is."""
        return {"kd_temperature": self.temperature.item()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.temperature.fill_(state["kd_temperature"])


def _projected(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [N, k + 1] at these columns, and of all others together."""
    log_p = torch.log_softmax(logits.float() / temperature, -1)
    known = log_p[:, ids]
    rest = (1 - known.exp().sum(-1, keepdim=True)).clamp(min=1e-30).log()
    return torch.cat([known, rest], -1)


def _check(student: Tensor, teacher: Tensor, *, same_classes: bool) -> None:
    if teacher.requires_grad:
        raise ValueError("no gradient flows to the teacher: detach its logits")
    rows = student.shape[:-1] == teacher.shape[:-1] and student.dim() >= 2
    if not rows or (same_classes and student.shape != teacher.shape):
        raise ValueError(
            f"student and teacher must have the same rows{' and classes' * same_classes}, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.softmax(wide / temperature, -1)


_DISTANCES = {"l1": ops.pairwise_l1, "l2": torch.cdist}
