"""MEND on Debian's sections: do a few vectors replace the demonstrations of a task?

A task is a pair of sections under two random words, "summary : word", so that nothing but its
demonstrations says which is which. The frozen language model has learnt to use them; that takes
some two minutes more, once, and is kept in the user's cache. The distiller begins as a copy of its
body, each placeholder as the sum of two label words, which makes it look for examples of these, and
vectors as large as embeddings. Stage A learns from text of the kind that the language model has
read, examples of any two sections, all but the last of which are distilled; stage B, a short one,
from tasks of 40 pairs (a distiller without stage A has had no more than that). Measured on 10 other
pairs, which neither model has met, and on packages that nobody has seen; each task once more with
its two words exchanged, so that a word which is likelier in itself gains nothing and zero-shot is
.5.
"""

import copy
import itertools
import os
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stillhouse.methods.language import (
    ContextDistiller,
    build_icl_batch,
    context_distillation_loss,
    prefix_cache,
    score_candidates,
)
from stillhouse.methods.language.side_by_side import side_by_side
from stillhouse.recipes.language.icl_lm import examples, icl_lm
from stillhouse.recipes.language.section_tasks import VOCABULARY, PairTask, SectionTasks
from stillhouse.report import Report
from stillhouse.train import Stage, run_stages

VECTORS, K = 16, 8
STEPS_A, STEPS_B, BATCH = 480, 60, 24
RATE_A, RATE_B, WARM_UP = 3e-3, 1e-3, 40
TASKS, QUERIES = 4, 25  # of each pair that is measured
NAMES = ("zero-shot", "random vectors", "MEND, no stage A", "MEND", "in-context learning")

Batch = dict[str, Tensor]
Ask = Callable[[Batch], tuple[Any, Tensor, Tensor]]  # prefix, query ids, mask


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    tasks = SectionTasks()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "stillhouse"
    lm, seconds = icl_lm(tasks, cache)
    report.table(
        "language model, trained once", [{"seconds to train": seconds, "kept in": str(cache)}]
    )

    rows, kd = [], []
    for seed in report.within(budget, seeds):
        measured = _held_out(tasks, seed)
        start = _distiller(lm, tasks, seed)
        distillers, curves = {}, {}
        for name, stages in (
            ("MEND, no stage A", [_stage_b(lm, tasks, seed)]),
            ("MEND", [_stage_a(lm, tasks, seed), _stage_b(lm, tasks, seed)]),
        ):
            distillers[name] = copy.deepcopy(start)
            curves[name] = run_stages(distillers[name], stages)
        asks: dict[str, Ask] = {
            "zero-shot": _alone,
            "in-context learning": _shown,
            "random vectors": _behind(_random(lm, seed)),
            **{name: _behind(partial(_distilled, each)) for name, each in distillers.items()},
        }
        accuracy = {name: _accuracy(lm, measured, ask) for name, ask in asks.items()}
        rows += [{"seed": seed, "prefix": name, "accuracy": accuracy[name]} for name in NAMES]
        kd.append([_kd(lm, measured[:: 2 * TASKS], each) for each in (start, distillers["MEND"])])
    _plot(report, curves)
    _report(report, rows, kd)
    report.table("a query, with its demonstrations", _costs(lm, distillers["MEND"], measured[0]))


def _report(report: Report, rows: list[dict], kd: list[list[float]]) -> None:
    of = {name: [row["accuracy"] for row in rows if row["prefix"] == name] for name in NAMES}
    report.table("accuracy on pairs held out", rows)
    report.claim("MEND's accuracy, against zero-shot's", of["MEND"], of["zero-shot"], margin=0.08)
    both = zip(of["MEND"], of["in-context learning"], of["zero-shot"], strict=True)
    shares = [(mend - zero) / (full - zero) for mend, full, zero in both]
    report.claim("share of in-context learning's gain that MEND keeps", shares, 0.7)
    fall = [1 - after / before for before, after in kd]
    report.claim("share by which the KL to the demonstrations' model falls, held out", fall, 0.4)
    report.value("KL, nats a token, before and after", kd)
    gain = [a - b for a, b in zip(of["MEND"], of["MEND, no stage A"], strict=True)]
    report.value("MEND's accuracy - that without stage A", gain)


# Training -----------------------------------------------------------------------------------------


def _distiller(lm: nn.Module, tasks: SectionTasks, seed: int) -> ContextDistiller:
    body, width = copy.deepcopy(lm.base_model), lm.config.hidden_size
    draws = torch.Generator().manual_seed(seed)
    distiller = ContextDistiller(body.requires_grad_(True), width, VECTORS, generator=draws)
    embedded, norm = lm.get_input_embeddings().weight, body.norm.weight
    labels = torch.tensor(tasks.labels)[torch.randperm(len(tasks.labels), generator=draws)]
    with torch.no_grad():
        distiller.placeholders.copy_(embedded[labels.view(VECTORS, 2)].sum(1))
        norm.mul_(embedded.square().mean().sqrt() / norm.square().mean().sqrt())
    return distiller


def _stage_a(lm: nn.Module, tasks: SectionTasks, seed: int) -> Stage:
    draw = random.Random(100 + seed)

    def batch(step: int) -> Batch:
        read, rest = [], []
        for _ in range(BATCH):
            ids, labels = examples(tasks, draw, (2,), K + 1)
            cut = [i + 1 for i, label in enumerate(labels) if label][K - 1]
            read.append(ids[:cut])
            rest.append(ids[cut:])
        return {**_padded("demo", read), **_padded("query", rest)}

    def loss(distiller: nn.Module, batch: Batch) -> dict[str, Tensor]:
        vectors = distiller(batch["demo_ids"], batch["demo_mask"])
        return context_distillation_loss(lm, vectors, **batch)

    return Stage("A", loss, STEPS_A, data=batch, lr=RATE_A, optimizer=partial(_optimizer, STEPS_A))


def _padded(name: str, rows: list[list[int]]) -> Batch:
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return {f"{name}_ids": ids, f"{name}_mask": mask}


def _stage_b(lm: nn.Module, tasks: SectionTasks, seed: int) -> Stage:
    draws = torch.Generator().manual_seed(200 + seed)

    def batch(step: int) -> Batch:
        some = [PairTask.drawn(tasks.train, tasks.meta, tasks.labels, draws) for _ in range(BATCH)]
        return build_icl_batch(some, K, size=BATCH, generator=draws)

    def loss(distiller: nn.Module, batch: Batch) -> dict[str, Tensor]:
        vectors = distiller(batch["demo_ids"], batch["demo_mask"])
        return context_distillation_loss(lm, vectors, **batch, ce_weight=1.0)

    return Stage("B", loss, STEPS_B, data=batch, lr=RATE_B, optimizer=partial(_optimizer, STEPS_B))


def _optimizer(steps: int, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Adam with gradients clipped, and a rate that rises for WARM_UP steps, then falls to 0."""
    optimizer, count = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98)), itertools.count()

    def before(*_: Any) -> None:
        step = next(count)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / WARM_UP, 1 - step / steps)

    optimizer.register_step_pre_hook(before)
    return optimizer


# Measuring ----------------------------------------------------------------------------------------


def _held_out(tasks: SectionTasks, seed: int) -> list[tuple[PairTask, Batch]]:
    draws = torch.Generator().manual_seed(300 + seed)
    found = []
    for pair in tasks.held_out:
        for _ in range(TASKS):
            task = PairTask.drawn(tasks.test, [pair], tasks.labels, draws)
            batch = build_icl_batch([task], K, size=QUERIES, generator=draws)
            found += [(task, batch), (task, _exchanged(task, batch))]
    return found


def _exchanged(task: PairTask, batch: Batch) -> Batch:
    """The same with the task's two words in each other's place."""
    other = torch.arange(VOCABULARY)
    other[task.words] = torch.tensor(task.words[::-1])
    return {**batch, **{name: other[batch[name]] for name in ("demo_ids", "query_ids")}}


def _accuracy(lm: nn.Module, measured: list[tuple[PairTask, Batch]], ask: Ask) -> float:
    """Of the two words of a task, the one with the larger score."""
    right = []
    for task, batch in measured:
        prefix, query, mask = ask(batch)
        scores = score_candidates(lm, prefix, query, [[w] for w in task.words], query_mask=mask)
        wanted = batch["query_ids"][batch["answer_mask"]]
        right.append(torch.tensor(task.words)[scores.argmax(1)] == wanted)
    return torch.cat(right).float().mean().item()


def _alone(batch: Batch) -> tuple[Any, Tensor, Tensor]:
    return None, batch["query_ids"], batch["query_mask"] & ~batch["answer_mask"]


def _shown(batch: Batch) -> tuple[Any, Tensor, Tensor]:
    """The query behind its demonstrations, as ids."""
    _, query, mask = _alone(batch)
    lengths = batch["demo_mask"].sum(1), mask.sum(1)
    ids = side_by_side(batch["demo_ids"], query, *lengths)
    return None, ids, torch.arange(ids.shape[1]) < sum(lengths)[:, None]


def _behind(vectors: Callable[[Batch], Tensor]) -> Ask:
    return lambda batch: (vectors(batch), *_alone(batch)[1:])


@torch.no_grad()
def _distilled(distiller: nn.Module, batch: Batch) -> Tensor:
    return distiller.eval()(batch["demo_ids"], batch["demo_mask"])


def _random(lm: nn.Module, seed: int) -> Callable[[Batch], Tensor]:
    """Embeddings of random tokens, others for each query."""
    draws, embedded = torch.Generator().manual_seed(400 + seed), lm.get_input_embeddings().weight

    def vectors(batch: Batch) -> Tensor:
        shape = len(batch["query_ids"]), VECTORS
        return embedded[torch.randint(len(embedded), shape, generator=draws)]

    return vectors


@torch.no_grad()
def _kd(lm: nn.Module, measured: list[tuple[PairTask, Batch]], distiller: nn.Module) -> float:
    parts = [
        context_distillation_loss(lm, _distilled(distiller, batch), **batch)["kd"]
        for _, batch in measured
    ]
    return torch.stack(parts).mean().item()


def _costs(lm: nn.Module, distiller: nn.Module, measured: tuple[PairTask, Batch]) -> list[dict]:
    """One query, both candidates: the vectors' keys and values are there, the demonstrations are
    read again, as in the paper."""
    task, batch = measured
    one = {name: x[:1] for name, x in batch.items()}
    cache = prefix_cache(lm, _distilled(distiller, one))
    rows = []
    for name, (prefix, query, mask) in (
        ("MEND, cached", (cache, *_alone(one)[1:])),
        ("in-context learning", _shown(one)),
    ):
        query, mask = query[:, : int(mask.sum())], None
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            score_candidates(lm, prefix, query, [[w] for w in task.words], query_mask=mask)
            seconds.append(time.perf_counter() - began)
        behind = 0 if prefix is None else VECTORS
        rows.append(
            {
                "prefix": name,
                "tokens read": query.shape[1],
                "MFLOP": _flops(lm, query.shape[1], behind) / 1e6,
                "ms": 1000 * sorted(seconds)[len(seconds) // 2],
            }
        )
    return rows


def _flops(lm: nn.Module, tokens: int, behind: int) -> float:
    """Two a weight of the blocks and a token, two products of attention, the head once."""
    config = lm.config
    weights = sum(x.numel() for name, x in lm.named_parameters() if ".layers." in name)
    read = sum(min(behind + i + 1, config.max_position_embeddings) for i in range(tokens))
    attention = 4 * config.hidden_size * config.num_hidden_layers * read
    return 2 * weights * tokens + attention + 2 * config.hidden_size * config.vocab_size


def _plot(report: Report, curves: dict[str, list[dict]]) -> None:
    series = {name: [row["kd"] for row in rows] for name, rows in curves.items()}
    steps = {name: list(range(1, len(values) + 1)) for name, values in series.items()}
    report.curve("kd", steps, series, ylabel="KL to the model with demonstrations, nats a token")
