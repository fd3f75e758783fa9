"""Return of the encoder: a decoder-only teacher for an encoder-decoder student.

A small model that encodes its input once and decodes with a third of its layers answers sooner than
a decoder-only one of its size. It learns from a large decoder-only teacher all the same: both
predict the tokens of the same answer, the teacher behind the prompt, the student in its decoder, so
their logits line up one to one. The teacher is fine-tuned on the task first. Most of the loss is
the divergence from it, on answers that the student has drawn itself; the rest is the labels'
cross-entropy.

Equation, x a source, y its target, y' an answer of the student, p teacher, q student:

    L = alpha mean_t KL(p(. | x, y'_<t) || q(. | x, y'_<t))
        + (1 - alpha) mean_t -log q(y_t | x, y_<t)

Paper: Return of the Encoder: Maximizing Parameter Efficiency for SLMs, arXiv 2501.16273. Code by
its authors: microsoft/encoder-decoder-slm.

Where we differ: their mean runs over all rows of a batch, those behind the end of an answer too, so
that short answers drown; ours over the tokens of the answers (targets that are padded before they
come here bring theirs back). They draw answers with dropout on, `train.rollout` without it. Stored
targets cost no drawing, and early answers of a student are poor: `train.ResponseSource` mixes both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stillhouse.methods.language.encoder_decoder import EncoderDecoder
from stillhouse.methods.language.encoder_decoder_config import EncoderDecoderConfig, layer_split
from stillhouse.methods.language.seq2seq_alignment import align_seq2seq
from stillhouse.methods.language.seq2seq_rows import Seq2SeqRows
from stillhouse.methods.language.shared_columns import shared_columns
from stillhouse.train import DivergenceObjective, LogitRows, row_loss, row_means

__all__ = [
    "CrossArchitectureLoss",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Seq2SeqRows",
    "align_seq2seq",
    "layer_split",
]


class CrossArchitectureLoss(DivergenceObjective):
    """alpha times the divergence from the teacher, 1 - alpha times the cross-entropy of the labels,
    as an objective.

    The divergence is taken on the rows that are given, answers of the student or stored ones. The
    cross-entropy is taken on `batch["gold"]`, the student's `LogitRows` of the labels, or without
    it on the same rows. `batch["denominator"]` and `batch["gold_denominator"]` replace the numbers
    of rows. Where the heads are of two widths the narrower one's columns count, or the first
    `batch["vocab_size"]`: both distributions are renormalised over them. alpha = 0 needs no
    teacher. Returns `loss` and statistics, with "gold" also `divergence` and `cross_entropy`.
    Raises ValueError for alpha outside [0, 1], rows that are not aligned, and a teacher with more
    than `dropped` of a row's mass in columns that do not count.

    Defaults: alpha 0.9, forward KL at temperature 1 (the authors' code); dropped 1e-4 (ours).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import CrossArchitectureLoss
        >>> from stillhouse.train import LogitRows, supervised_rows
        >>> index = supervised_rows(torch.tensor([[5, 3, 1, 2]]))
        >>> student = torch.zeros(3, 8, requires_grad=True)
        >>> rows = LogitRows(student * 1, index), LogitRows(torch.eye(3, 8), index)
        >>> loss = CrossArchitectureLoss()(*rows, {})["loss"]
        >>> round(loss.item(), 4)
        0.2846
        >>> loss.backward()
    """

    def __init__(
        self,
        alpha: float = 0.9,
        *,
        kind: Any = "forward_kl",
        temperature: float = 1.0,
        dropped: float = 1e-4,
    ):
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is a share in [0, 1], got {alpha}")
        if alpha == 0:
            super().__init__("cross_entropy")
        else:
            super().__init__(kind, temperature=temperature, label_weight=1 - alpha)
        self.alpha, self.dropped = alpha, dropped

    def __call__(
        self, student: LogitRows, teacher: Any, batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        if self.needs_teacher:
            options = dict(temperature=self.temperature, most=self.dropped)
            columns = shared_columns(student, teacher, batch.get("vocab_size"), **options)
            batch = {**batch, "vocab_size": columns}
        gold = batch.get("gold")
        if gold is None:
            return super().__call__(student, teacher, batch)
        labels = {**batch, "denominator": batch.get("gold_denominator")}
        if not self.needs_teacher:
            return super().__call__(gold, None, labels)
        divergence, stats = row_loss(
            student, teacher, self.kind, batch, temperature=self.temperature
        )
        parts = {"loss": divergence, "divergence": divergence.detach(), **row_means(stats)}
        if self.alpha < 1:
            entropy, _ = row_loss(gold, None, "cross_entropy", labels)
            parts["loss"] = self.alpha * divergence + (1 - self.alpha) * entropy
            parts["cross_entropy"] = entropy.detach()
        return parts
