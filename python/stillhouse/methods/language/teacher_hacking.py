"""Teacher hacking: a student that comes closer to its teacher and goes away from the truth.

A teacher is an imperfect picture of the truth, and a student may learn its mistakes. To see it one
needs the truth: an oracle model, of which the teacher was trained on samples. With a fixed set of
responses and many epochs the distance to the oracle rises while that to the teacher falls; with
responses that are drawn anew, or more prompts, it does not. Without an oracle there is a sign: the
distance to the teacher leaves its power law.

Equation, mu the oracle, T the teacher, S the student, x prompts, y responses:

    d(p || q) = E_x E_{y ~ p(.|x)} sum_t KL(p(.|x, y_<t) || q(.|x, y_<t))
    golden = d(mu || S),   proxy = d(T || S),   rise = golden(end) - min_s golden(s)
    proxy(s) = e^a s^-b   as long as nothing is hacked

Paper: On Teacher Hacking in Language Model Distillation, arXiv 2502.02671. No code is public; the
form of the estimator, the thresholds of `detect` and its window are our reading.

Both distances are of responses to validation prompts that are drawn once: drawn anew, their noise
would hide the effect, and the loss of training on kept responses goes to zero and says nothing.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from stillhouse.methods.language.hacking_trace import Trace, detect
from stillhouse.methods.language.sequence_distance import (
    kl_sums,
    same_vocabulary,
    sequence_kl,
    stderr,
)
from stillhouse.progress import Progress
from stillhouse.train import ResponseSource, rollout, supervised_rows
from stillhouse.train.forward import frozen, row_forward
from stillhouse.train.objective import row_loss
from stillhouse.train.responses import Tokens, tokens

__all__ = ["HackingStudy", "Trace", "detect", "sequence_kl"]

SOURCES = ("offline_teacher", "online_teacher", "online_student")


class HackingStudy:
    """Distils copies of a student from several sources, and measures golden and proxy distances.

    oracle, teacher, student: causal language models of one vocabulary, or modules that map ids
    [B, T] to logits [B, T, V] (`train.rollout`). prompts: those of the distillation; validation:
    those of both distances, with responses of at most max_new_tokens that are drawn once from the
    oracle and once from the teacher; tuning_prompts: those that teacher and student were tuned on,
    if they are to be compared with the others. `golden_teacher` is d(mu || T): a student that
    converges to its teacher ends there, and its rise up to that line is not hacking.
    Raises ValueError for unlike vocabularies, empty sets of prompts, a prompt of both sets, and
    max_new_tokens < 1. Warns of tuning prompts that come again.

    Defaults: 32 responses a step and Adam at 3e-4 (the paper, which warms up for 100 steps before:
    pass an optimizer for that), forward KL, no dropout.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import HackingStudy
        >>> class Unigram(torch.nn.Module):
        ...     def __init__(self, logits):
        ...         super().__init__()
        ...         self.logits = torch.nn.Parameter(torch.tensor(logits))
        ...     def forward(self, ids):
        ...         return self.logits.expand(*ids.shape, -1)
        >>> models = [Unigram(x) for x in ([0.0, 1.0], [0.0, 2.0], [1.0, 0.0])]
        >>> options = dict(validation=[[1], [1, 1]], max_new_tokens=3)
        >>> study = HackingStudy(*models, [[0], [0, 1]], **options)
        >>> trace = study.run("online_teacher", steps=20)
        >>> trace.proxy[-1] < trace.proxy[0]
        True
    """

    def __init__(
        self,
        oracle: Any,
        teacher: Any,
        student: nn.Module,
        prompts: Sequence[Tokens],
        *,
        validation: Sequence[Tokens],
        max_new_tokens: int,
        tuning_prompts: Sequence[Tokens] = (),
        seed: int = 0,
    ):
        self.oracle, self.teacher, self.student = oracle, teacher, student
        self.prompts, self.validation = tokens(prompts), tokens(validation)
        self.max_new_tokens, self.seed = max_new_tokens, seed
        if not self.prompts or not self.validation:
            raise ValueError("a study needs prompts to train on, and others for validation")
        known = {tuple(each.tolist()) for each in self.prompts}
        held = {tuple(each.tolist()) for each in self.validation}
        if known & held:
            raise ValueError(f"the validation prompt {min(known & held)} is one to train on, too")
        again = sum(tuple(each.tolist()) in known | held for each in tokens(tuning_prompts))
        if again:
            warnings.warn(f"{again} tuning prompts are also prompts of the study", stacklevel=2)
        for model in (teacher, student):
            same_vocabulary(model, oracle, self.validation)
        options = dict(max_new_tokens=max_new_tokens, seed=seed)
        self._true = rollout(oracle, self.validation, **options)
        self._taught = rollout(teacher, self.validation, **options)
        self.golden_teacher = sequence_kl(teacher, oracle, (), responses=self._true)[1]

    def run(
        self,
        source: str | ResponseSource,
        *,
        generations: int = 1,
        count: int | None = None,
        kind: Any = "forward_kl",
        steps: int,
        batch: int = 32,
        evaluations: int = 24,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    ) -> Trace:
        """Trains a copy of the student on the divergence `kind` from the teacher at each token.

        source: "offline_teacher" (`generations` responses to each prompt, drawn once),
        "online_teacher" or "online_student" (drawn anew at each visit; the student is the copy), or
        a source of your own, such as a mixture. count: the first so many prompts only. steps: of
        `batch` responses each; both distances are measured at the start and at about `evaluations`
        steps, evenly spaced in their logarithm. Raises ValueError for an unknown source, and for
        generations, steps or evaluations < 1.
        """
        if steps < 1 or evaluations < 1:
            raise ValueError(f"expected steps and evaluations >= 1, got {steps}, {evaluations}")
        student, name = copy.deepcopy(self.student).eval(), str(source)
        if isinstance(source, str):
            if source not in SOURCES:
                raise ValueError(f"no source {source!r}: expected one of {', '.join(SOURCES)}")
            own = {"student": student} if source == "online_student" else {"teacher": self.teacher}
            source = ResponseSource(
                self.prompts[:count],
                **own,
                online=source != "offline_teacher",
                generations=generations,
                max_new_tokens=self.max_new_tokens,
                seed=self.seed,
            )
        optimizer = (optimizer or functools.partial(torch.optim.Adam, lr=3e-4))(
            student.parameters()
        )
        rows, taught = row_forward(student), row_forward(self.teacher)
        device = self._true.ids.device
        ratio = steps ** (1 / max(evaluations - 1, 1))
        wanted = {0, steps, *(round(ratio**i) for i in range(evaluations))}
        trace, golden, losses, progress = Trace(), [], [], Progress("steps")
        for step in range(steps + 1):
            if step:
                inputs = source.batch(batch).to(device).batch()
                index = supervised_rows(inputs["labels"])
                with frozen(self.teacher):
                    with torch.no_grad():
                        target = taught(inputs, index)
                    loss, _ = row_loss(rows(inputs, index), target, kind, inputs)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            if step in wanted:
                golden.append(kl_sums(student, self.oracle, self._true))
                trace.steps.append(step)
                trace.loss.append(torch.stack(losses).mean().item() if losses else math.nan)
                trace.golden.append(golden[-1].sum().item() / int(self._true.mask.sum()))
                taught_kl = sequence_kl(student, self.teacher, (), responses=self._taught)
                trace.proxy.append(taught_kl[1])
                losses = []
            progress(name, step, steps)
        lowest = min(range(len(golden)), key=trace.golden.__getitem__)
        length = int(self._true.mask.sum()) / len(self._true)
        trace.rise_stderr = stderr(golden[-1] - golden[lowest]) / length
        return trace
