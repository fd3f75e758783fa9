"""TAID: the student chases a target that moves from itself to the teacher.

A small student cannot jump to a big teacher's distribution: forward KL averages the modes it
cannot hold, reverse KL drops them. TAID's target is the softmax of an interpolation, in logit
space, between the student's own detached logits and the teacher's; its weight t grows from
t_start to t_end, faster while the loss improves.

Equation, z student logits, T teacher logits, q = softmax(z):

    p_t = softmax((1 - t) stopgrad(z) + t T),   J = -sum_j p_t(j) log q(j),   dJ/dz = q - p_t

    r  = (J_prev - J) / (J_prev + 1e-15)
    mu = beta mu + (1 - beta) r
    t  = min(t_end, max(t_start + (t_end - t_start) n / N, t + alpha sigmoid(mu) (1 - t)))

Paper: TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in
Language Models, ICLR 2025, arXiv 2501.16937. Code by its authors: SakanaAI/TAID.

Where we say more than they do: their t follows each rank's own loss, ours the loss averaged over
micro-batches and ranks; their t is not in checkpoints, ours is; alpha = 5e-4 loses against the
linear floor in runs shorter than about 3,000 steps, hence alpha="auto".
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.train import DivergenceObjective, LogitRows, ramp, reduce, row_means

# What is reported for humans would cost two more passes over [N, V] each step: it is read off at
# most this many evenly spaced rows, and the log averages over steps.
REPORTED_ROWS = 16


def taid_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    t: float | Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """Cross-entropy to the interpolated target, -sum p_t log q, mean over the unmasked rows.

    student_logits, teacher_logits: [..., V], any float dtype each; the gradient goes to the
    student's q alone, never into the target or the teacher. t in [0, 1]: 0 gives a zero gradient,
    1 forward KL's; a 0-d tensor where it changes under torch.compile. mask: bool [...], True = this
    row counts; nothing unmasked gives 0. temperature divides both sides, no T^2 factor.
    Returns a float32 scalar (float64 for float64 logits). Raises ValueError for t outside [0, 1]
    and for shapes or vocabularies that do not match.

    Defaults: temperature 1 (the authors' code).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import taid_loss
        >>> student = torch.tensor([[0.25, 0.50, 0.25]]).log().requires_grad_()
        >>> teacher = torch.tensor([[0.50, 0.25, 0.25]]).log()
        >>> loss = taid_loss(student, teacher, t=0.4)
        >>> round(loss.item(), 4)
        1.1124
        >>> loss.backward()
    """
    per_row = ops.divergence(
        student_logits, teacher_logits, ops.TAID(t), mask=mask, temperature=temperature
    )
    return reduce(per_row, mask)


class TAIDLoss(DivergenceObjective):
    """`taid_loss` with the schedule of t, as an objective that `DistillTrainer` can follow.

    The call returns `loss`, `t`, `delta_t` (the last adaptive increment, whether or not it beat
    the linear floor), `kl_to_target` (KL(p_t || q)) and the statistics of student against teacher
    (acceptance, agreement, entropies): means over at most 16 evenly spaced rows of the batch.
    `update` moves t; `state_dict` holds it.

    Defaults: t_start 0.4 (authors' code; the paper uses 0.2-0.4: 0.4 for Phi-3 -> TinyLlama, 0.2
    for Llama-2 -> TinyLlama and StableLM -> Pythia), t_end 1, alpha 5e-4, beta 0.99 (paper and
    code), label_weight 0 (the authors' scripts: distillation alone). alpha="auto" is 8 / N for a
    run of N steps: it keeps alpha N near the paper's runs when yours is shorter.
    Raises ValueError unless 0 <= t_start < t_end <= 1, alpha in [0, 1] or "auto", beta in [0, 1).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import TAIDLoss
        >>> from stillhouse.train import LogitRows, supervised_rows
        >>> objective = TAIDLoss(t_start=0.4, alpha="auto")
        >>> index = supervised_rows(torch.tensor([[5, 3, 1, 2]]))
        >>> student = torch.zeros(3, 8, requires_grad=True)
        >>> rows = LogitRows(student * 1, index), LogitRows(torch.eye(3, 8), index)
        >>> parts = objective(*rows, {})
        >>> parts["loss"].backward()
        >>> for step in (1, 2, 3):
        ...     objective.update({"loss": 2.0}, step, total_steps=4)
        >>> round(objective.t, 2)
        0.85
    """

    def __init__(
        self,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float | Literal["auto"] = 5e-4,
        beta: float = 0.99,
        adaptive: bool = True,
        *,
        temperature: float = 1.0,
        label_weight: float = 0.0,
    ):
        if not 0 <= t_start < t_end <= 1:
            raise ValueError(f"expected 0 <= t_start < t_end <= 1, got {t_start} and {t_end}")
        if alpha != "auto" and not (isinstance(alpha, (int, float)) and 0 <= alpha <= 1):
            raise ValueError(f"expected alpha in [0, 1] or 'auto', got {alpha!r}")
        if not 0 <= beta < 1:
            raise ValueError(f"expected beta in [0, 1), got {beta}")
        # The op gets t as a tensor: a number that moves every step would recompile every step.
        t = torch.tensor(t_start, dtype=torch.float64)
        super().__init__(ops.TAID(t), temperature=temperature, label_weight=label_weight)
        self.t_start, self.t_end, self.beta, self.adaptive = t_start, t_end, beta, adaptive
        self.alpha = alpha
        self.momentum, self.delta_t = 0.0, 0.0
        self.previous_loss: float | None = None

    @property
    def t(self) -> float:
        """The weight of the teacher in the target of the next step."""
        return self.kind.t.item()

    @property
    def value(self) -> float:
        """t, by the name that `train.Schedule` has for it."""
        return self.t

    def __call__(
        self, student: LogitRows, teacher: LogitRows, batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        if not isinstance(teacher, LogitRows):
            found = type(teacher).__name__
            raise ValueError(f"TAID interpolates between logits: it needs a teacher's, got {found}")
        # Copied first: the loss may write its gradient over logits that the rows were given.
        sampled = slice(None, None, -(-len(student) // REPORTED_ROWS) or 1)
        with torch.no_grad():
            rows = student.part(sampled).logits.clone(), teacher.part(sampled).logits
        loss = super().__call__(student, teacher, batch)["loss"]
        options = {
            "temperature": self.temperature,
            "vocab_size": batch.get("vocab_size"),
            "return_stats": True,
        }
        # In the loss's own pass the target stands in the teacher's place: its statistics give the
        # target's entropy, those of any other kind compare with the teacher itself.
        cross_entropy, to_target = ops.divergence(*rows, self.kind, **options)
        _, to_teacher = ops.divergence(*rows, "forward_kl", **options)
        return {
            "loss": loss,
            "t": torch.tensor(self.t),
            "delta_t": torch.tensor(self.delta_t),
            "kl_to_target": reduce(cross_entropy - to_target.teacher_entropy),
            **row_means(to_teacher),
        }

    def update(self, stats: Mapping[str, float], step: int, total_steps: int) -> None:
        """Moves t after optimiser step `step` of `total_steps` (counted from 1).

        stats["loss"]: the loss of that step, averaged over micro-batches and ranks, so that every
        rank moves alike. The first loss is only remembered. A loss of exactly 0 is a batch without
        a supervised row and changes nothing. Raises ValueError, t unchanged, for a loss that is
        not finite and for a step outside [0, total_steps].
        """
        loss = float(stats["loss"])
        if not math.isfinite(loss):
            raise ValueError(f"expected a finite loss, got {loss} at step {step}: t stays {self.t}")
        if total_steps < 1 or not 0 <= step <= total_steps:
            raise ValueError(f"expected 0 <= step <= total_steps >= 1, got {step} of {total_steps}")
        if loss == 0:
            return
        if self.previous_loss is not None:
            improvement = (self.previous_loss - loss) / (self.previous_loss + 1e-15)
            self.momentum = self.beta * self.momentum + (1 - self.beta) * improvement
            alpha = min(1.0, 8 / total_steps) if self.alpha == "auto" else self.alpha
            # sigmoid as tanh: exp overflows when the loss jumps up from almost nothing.
            sigmoid = (1 + math.tanh(self.momentum / 2)) / 2
            self.delta_t = alpha * sigmoid * (1 - self.t)
            t = ramp(step, total_steps, self.t_start, self.t_end)
            if self.adaptive:
                t = max(t, self.t + self.delta_t)
            self.kind.t.fill_(min(self.t_end, t))
        self.previous_loss = loss

    def state_dict(self) -> dict[str, float | None]:
        """What a resumed run needs, so that t does not start again at t_start."""
        return {
            "t": self.t,
            "delta_t": self.delta_t,
            "momentum": self.momentum,
            "previous_loss": self.previous_loss,
        }

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        self.kind.t.fill_(state["t"])
        self.delta_t, self.momentum = state["delta_t"], state["momentum"]
        self.previous_loss = state["previous_loss"]
