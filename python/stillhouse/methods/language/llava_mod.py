"""LLaVA-MoD: a small student made into a mixture of experts imitates a teacher, then outdoes it.

Every other feed-forward layer of the student becomes E copies of itself, of which a router gives
each token two (`nn.moe.upcycle_`; `distill --student experts:4@...`): more to learn with at the
cost of two. Teaching goes in stages (`train.run_stages`): the dense student imitates the teacher,
its experts and routers do, and then good answers are told from bad ones, with the *teacher as the
reference* of DPO or KTO, so that the student prefers the good one more than its teacher does.

Equation, p the teacher's, q the student's, over supervised rows; f_e the share of tokens whose
first expert is e, P_e its mean probability; r = log pi_S(y | x) - log pi_T(y | x), D = r+ - r-:

    KD = -mean sum_v p(v) log q(v),   aux = sum_layers E sum_e f_e P_e
    mimic: KD + lambda aux,   mimic_ce: KD + CE + lambda aux
    preference: l(r+, r-) + lambda (aux(preferred) + aux(other)),   of DPO l = -log sigma(beta D)

Paper: LLaVA-MoD: Making LLaVA Tiny via MoE Knowledge Distillation, ICLR 2025, arXiv 2408.15881.
Code by its authors: shufangxun/LLaVA-MoD.

Where their code differs: it pairs row i with label i, so that the row of the first response token
is left out and the one after the last is taught; with CE it adds lambda aux twice; the means of
kto_pair have a gradient. We do none of it. KD is a cross-entropy and ends at the teacher's entropy;
`kl` is reported without it. Rows are what `labels` say: for distill_all_tokens label prompts too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.methods.language.response_pairs import prefer, preference_batch
from stillhouse.methods.language.vision_prefix import VisionPrefix
from stillhouse.nn.moe import MoE, RouterInfo, router_balance
from stillhouse.train import DivergenceObjective, LogitRows, preference_loss

__all__ = ["LLaVAMoDLoss", "VisionPrefix", "preference_batch"]

STAGES = ("mimic", "mimic_ce", "preference")


class LLaVAMoDLoss(DivergenceObjective):
    """The loss of one stage, as an objective for `Taught` and `DistillTrainer`.

    stage: "mimic", for dense students and mixtures; "mimic_ce"; "preference", on batches of
    `preference_batch`, by `Taught` only. balance: lambda. kind, beta, label_smoothing: those of
    `train.preference_loss`. `use_student(model)`, which both callers do, finds the mixtures.
    The call returns `loss`; of mixtures `balance` (aux) and `largest_load` (the fullest expert's
    share of choices over the mean); with "mimic" `kl`, with both imitations the statistics of rows;
    with "preference" those of `preference_loss`, `token_margin` (D of means over tokens: sums are
    ruled by long answers), `student_accuracy` and `reference_accuracy`, how often a model alone
    finds the preferred answer likelier. Padding is routed like any token.
    Raises ValueError for another stage, balance < 0, what `preference_loss` refuses, preference
    options in another stage; in the call for batches without pairs and empty responses.

    Defaults: balance 0.01, beta 0.1 (paper and code), kind "kto_pair" (the authors' script).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import LLaVAMoDLoss
        >>> from stillhouse.train import LogitRows, supervised_rows
        >>> index = supervised_rows(torch.tensor([[5, 3, 1, 2]]))
        >>> student = torch.zeros(3, 8, requires_grad=True)
        >>> rows = LogitRows(student * 1, index), LogitRows(torch.eye(3, 8), index)
        >>> parts = LLaVAMoDLoss("mimic")(*rows, {})
        >>> parts["loss"].backward()
        >>> round(parts["loss"].item(), 4), round(parts["kl"].item(), 4)
        (2.0794, 0.0851)
    """

    def __init__(
        self,
        stage: str = "mimic",
        *,
        balance: float = 0.01,
        kind: str = "kto_pair",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
    ):
        if stage not in STAGES:
            raise ValueError(f"stage must be {', '.join(STAGES)}, got {stage!r}")
        if not 0 <= balance < float("inf"):
            raise ValueError(f"balance is a weight, at least 0, got {balance}")
        self.needs_pairs = stage == "preference"
        if not self.needs_pairs and (kind, beta, label_smoothing) != ("kto_pair", 0.1, 0.0):
            raise ValueError(
                f"kind, beta and label_smoothing are of 'preference', not of {stage!r}"
            )
        # KD + CE is twice their mean, which is one pass.
        super().__init__("soft_cross_entropy", label_weight=0.5 if stage == "mimic_ce" else 0.0)
        self.stage, self.balance = stage, balance
        self.preference = {"kind": kind, "beta": beta, "label_smoothing": label_smoothing}
        preference_loss(*torch.zeros(2, 1, 2), **self.preference)  # what it refuses, now
        self.sparse_tails = () if self.needs_pairs else self.sparse_tails
        self.mixtures: list[MoE] = []

    def use_student(self, model: nn.Module) -> None:
        """Take the balance of these mixtures: all that are in the model."""
        self.mixtures = [module for module in model.modules() if isinstance(module, MoE)]

    def __call__(
        self, student: LogitRows, teacher: Any, batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        # Micro-batches and ranks share a denominator; what is no sum of rows takes its share of it.
        rows = max(len(student), 1)
        share = rows / batch.get("denominator", rows)
        if self.needs_pairs:
            parts, halves = prefer(student, teacher, batch, **self.preference), 2
        else:
            parts, halves = super().__call__(student, teacher, batch), 1
            if self.stage == "mimic_ce":
                parts["loss"] = 2 * parts["loss"]
            else:
                parts["kl"] = parts["loss"].detach() / share - parts["teacher_entropy"]
        if self.mixtures:
            infos = [mixture.info for mixture in self.mixtures]
            aux = sum(router_balance(half, "gshard") for i in infos for half in _parts(i, halves))
            parts["loss"] = parts["loss"] + self.balance * share * aux
            parts["balance"] = aux.detach()
            loads = [info.load.max() / info.load.float().mean() for info in infos]
            parts["largest_load"] = torch.stack(loads).max()
        return parts


def _parts(info: RouterInfo, count: int) -> list[RouterInfo]:
    """A batch's routing in so many equal parts, as far as first choices go."""
    if count == 1 or info.index is None or info.probs is None:
        return [info]
    chunks = zip(info.index.chunk(count), info.probs.chunk(count), strict=True)
    return [info._replace(index=index, probs=probs) for index, probs in chunks]
