"""MGSR: correct what the student says, clip what the teacher says, and match phrases.

Training on a student's own text repeats its errors, and a teacher's row over a whole vocabulary is
mostly noise. Three parts answer that: `revise` replaces the worst token of a response by the
teacher's and lets the student go on from there; DAC-KL compares with the part of the teacher's
distribution inside a window that a small network learns to set; and within phrases the products of
adjacent distributions are matched.

Equation, p teacher, q student, c_k the mass of all classes before k in the order of p and half of
its own, (l, u) the window, kappa its softness:

    m_k = sigmoid((c_k - l) / kappa) sigmoid((u - c_k) / kappa),   p' = m p / sum(m p)
    L_DAC = sum_k p'_k (log p'_k - log q_k)
    L_span = mean over adjacent i, i + 1 of one phrase of || q_i q_{i+1} - p_i p_{i+1} ||^2
    L = L_SFT + L_DAC + L_span

Paper: Multi-Granularity Semantic Revision for Large Language Model Distillation, arXiv 2407.10068.
No code is public and the text leaves much open: this is our reading. The features of the network,
its width, the order of clipping and the norm of the span term are ours, and so is the guard: the
window holds at least half of the mass, the likeliest class and the label.

**A window that is trained to make its own KL small serves itself**: it clips what is hard. Watch
`lower` and `upper`, and compare with a fixed window, (0, 0.9). The student is not renormalised to
the window: what it has outside would be free.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import ops
from stillhouse.methods.language.phrases import Spans, phrase_spans, token_spans
from stillhouse.methods.language.revision import Score, revise
from stillhouse.methods.language.span_products import span_correlation
from stillhouse.methods.language.teacher_window import DACKL, clipped_kl
from stillhouse.train import LogitRows, Responses, reduce, row_means

__all__ = ["DACKL", "MGSRLoss", "clipped_kl", "phrase_spans", "revise", "span_correlation"]

REPORTED_ROWS = 16  # what costs another pass over [N, V] is read off at most so many rows


class MGSRLoss:
    """Label loss, DAC-KL and span correlation, as an objective for `DistillTrainer`.

    weights: of the three. window: None, and `DACKL(features, hidden)` learns one for each row, in
    the student's optimiser; or a fixed (lower, upper). The third part takes its phrases from the
    targets' text: `tokenizer`, which `stillhouse distill` sets (`use_tokenizer`), gives each
    token's own, and `chunker` the spans of what they make up. Responses that the student draws
    while it trains (`train.OnPolicy`) are revised first, in `rounds` by `score`.
    The call returns `loss`, and without a gradient its parts `sft`, `dac` and `span`, the means of
    `lower` and `upper`, and on at most 16 evenly spaced rows the statistics of student against
    teacher. The whole logits of the batch exist.
    Raises ValueError for three weights that are not >= 0, a window outside of [0, 1], and where it
    is called with other teachers than models, or for spans without a tokenizer.

    Defaults: weights 1, 1, 1 (the paper); features and hidden are ours.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import MGSRLoss
        >>> from stillhouse.train import LogitRows, supervised_rows
        >>> index = supervised_rows(torch.tensor([[5, 3, 1, 2]]))
        >>> student = torch.zeros(3, 8, requires_grad=True)
        >>> rows = LogitRows(student * 1, index), LogitRows(torch.eye(3, 8), index)
        >>> parts = MGSRLoss(weights=(1, 1, 0), features=4)(*rows, {})
        >>> parts["loss"].backward()
    """

    needs_teacher = True

    def __init__(
        self,
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        *,
        window: tuple[float, float] | None = None,
        features: int = 128,
        hidden: int = 256,
        softness: float = 0.05,
        tokenizer: Any = None,
        chunker: Callable[[str], Spans] = phrase_spans,
        rounds: int = 1,
        score: Score = "kl",
        seed: int = 0,
    ):
        if rounds < 0:
            raise ValueError(f"rounds must be at least 0, got {rounds}")
        if len(weights) != 3 or not all(0 <= each < float("inf") for each in weights):
            raise ValueError(f"weights must be three numbers >= 0, got {weights}")
        if window is not None and not (len(window) == 2 and 0 <= window[0] < window[1] <= 1):
            raise ValueError(f"a window must have 0 <= lower < upper <= 1, got {window}")
        self.weights, self.fixed, self.softness = weights, window, softness
        self.dac = None if window else DACKL(features, hidden, softness=softness, seed=seed)
        self.chunker, self._texts = chunker, {}
        self.rounds, self.score = rounds, score
        self.use_tokenizer(tokenizer)

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Take the tokens' texts from this tokenizer."""
        self.tokenizer = tokenizer
        self._texts.clear()

    def __call__(
        self, student: LogitRows, teacher: LogitRows, batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        if not isinstance(teacher, LogitRows):
            found = type(teacher).__name__
            raise ValueError(f"MGSR orders whole rows: it needs a teacher's logits, got {found}")
        columns, target = batch.get("vocab_size"), student.index.target
        own = student.logits[:, :columns]
        with torch.no_grad():
            other = teacher.logits[:, :columns]
        if self.dac is None:
            window = [own.new_full((len(own),), each, dtype=torch.float32) for each in self.fixed]
        else:
            window = self.dac.to(own.device).window(own, other)
        options = dict(softness=self.softness, keep=target)
        parts = {
            "sft": ops.divergence(own, None, "cross_entropy", labels=target),
            "dac": clipped_kl(own, other, *window, **options),
        }
        count = batch.get("denominator")
        parts = {name: reduce(each, count=count) for name, each in parts.items()}
        parts["span"] = own[:0].sum()
        if self.weights[2]:
            # A mean over the step's rows, as the other parts are.
            share = 1.0 if count is None else len(student) / count
            parts["span"] = share * span_correlation(own, other, self.spans(student))
        loss = sum(w * part for w, part in zip(self.weights, parts.values(), strict=True))
        sampled = slice(None, None, -(-len(student) // REPORTED_ROWS) or 1)
        _, stats = ops.divergence(own[sampled].detach(), other[sampled], return_stats=True)
        return {
            "loss": loss,
            **{name: part.detach() for name, part in parts.items()},
            "lower": reduce(window[0].detach()),
            "upper": reduce(window[1].detach()),
            **row_means(stats),
        }

    def revise(
        self, student: Any, teacher: Any, responses: Responses, **sampling: Any
    ) -> Responses:
        """What a trainer makes of the student's responses: `revise`, in `rounds` by `score`."""
        options = dict(score=self.score, rounds=self.rounds)
        return revise(student, teacher, responses, **options, **sampling)

    def spans(self, rows: LogitRows) -> Spans:
        """The phrases of the rows' targets, in rows: none goes over what no row predicts."""
        if self.tokenizer is None:
            raise ValueError(
                "span correlation needs the tokens' texts: pass tokenizer=, or weights=(1, 1, 0)"
            )
        row, sequence = rows.index.row, rows.index.sequence
        # Rows that follow one another are those of one response.
        breaks = ((row[1:] != row[:-1] + 1) | (sequence[1:] != sequence[:-1])).nonzero()[:, 0] + 1
        edges = [0, *breaks.tolist(), len(row)]
        result: Spans = []
        for start, end in itertools.pairwise(edges):
            texts = [self._text(token) for token in rows.index.target[start:end].tolist()]
            result += [(start + a, start + b) for a, b in token_spans(texts, self.chunker)]
        return result

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token])
        return self._texts[token]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the network that sets the window."""
        return iter(()) if self.dac is None else self.dac.parameters()

    def state_dict(self) -> dict[str, Any]:
        """The network's parameters."""
        return {} if self.dac is None else {"dac": self.dac.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.dac is not None:
            self.dac.load_state_dict(state["dac"])
