"""Batches for MEND: passages cut in two, and demonstrations with a query of the same task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Task = Sequence[tuple[Sequence[int], Sequence[int]]]


def split_for_pretraining(ids: Tensor, fraction: float = 0.8) -> tuple[Tensor, Tensor]:
    """A passage's first part, which stands for demonstrations, and the rest, the query (stage A).

    ids: int64 [T] or [B, T]; the first part has floor(fraction T) tokens.
    Raises ValueError for a fraction outside (0, 1) and for a passage of which a part is empty.

    Defaults: fraction 0.8 (paper and code).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import split_for_pretraining
        >>> split_for_pretraining(torch.arange(6))
        (tensor([0, 1, 2, 3]), tensor([4, 5]))
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie in (0, 1), got {fraction}")
    count = ids.shape[-1]
    # 0.7 * 10 is less than 7 in binary: what is meant is the product as written.
    first = int(round(fraction * count, 9))
    if not 0 < first < count:
        part = "query" if first else "first part"
        raise ValueError(f"the {part} is empty: {count} tokens cut at {fraction}")
    return ids[..., :first], ids[..., first:]


def build_icl_batch(
    tasks: Sequence[Task],
    k: int = 16,
    *,
    size: int = 1,
    generator: torch.Generator,
    example_length: int = 256,
    demo_length: int = 900,
    padding: int = 0,
) -> dict[str, Tensor]:
    """`size` rows, each k demonstrations and a query of one task, all drawn at random (stage B).

    A task is a sequence of (input ids, output ids); the query is never among its demonstrations. An
    example is its input, then its output; too long ones lose the end of their input. Demonstrations
    are drawn without replacement and stand one behind the other; of more than demo_length tokens
    the first ones go, and one of which a part stays keeps its output and the end of its input.
    Returns demo_ids [size, D], query_ids [size, Q] (int64, filled with `padding` on the right),
    demo_mask, query_mask and answer_mask (bool; the last one is True on the query's output).
    Raises ValueError without a task, for k < 0 or size < 1, a task of at most k examples, an
    example without an output, and one whose input is empty or would be after truncation.

    Defaults: k 16, example_length 256, demo_length 900 (paper and code).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import build_icl_batch
        >>> parity = [((number,), (10 + number % 2,)) for number in range(1, 9)]
        >>> draws = torch.Generator().manual_seed(0)
        >>> batch = build_icl_batch([parity], k=3, size=2, generator=draws)
        >>> batch["demo_ids"].shape, batch["query_ids"].shape
        (torch.Size([2, 6]), torch.Size([2, 2]))
        >>> batch["answer_mask"]
        tensor([[False,  True],
                [False,  True]])
    """
    if not tasks or k < 0 or size < 1:
        raise ValueError(f"expected a task, k >= 0, size >= 1: got {len(tasks)}, {k} and {size}")
    demos, queries, answers = [], [], []
    for _ in range(size):
        number = int(torch.randint(len(tasks), (), generator=generator))
        task = tasks[number]
        if len(task) <= k:
            raise ValueError(f"task {number} has {len(task)} examples: k = {k} needs {k + 1}")
        drawn = torch.randperm(len(task), generator=generator)[: k + 1].tolist()
        *shown, (given, wanted) = (_example(*task[i], example_length) for i in drawn)
        demos.append(_demonstrations(shown, demo_length))
        queries.append(given + wanted)
        answers.append([False] * len(given) + [True] * len(wanted))
    demo_ids, demo_mask = _padded(demos, padding)
    query_ids, query_mask = _padded(queries, padding)
    answer_mask, _ = _padded(answers, False)
    return {
        "demo_ids": demo_ids,
        "demo_mask": demo_mask,
        "query_ids": query_ids,
        "query_mask": query_mask,
        "answer_mask": answer_mask,
    }


def _example(given: Sequence[int], wanted: Sequence[int], length: int) -> tuple[list, list]:
    given, wanted = list(given)[: max(length - len(wanted), 0)], list(wanted)
    if not wanted:
        raise ValueError("an example has no output")
    if not given:
        raise ValueError(
            f"the input of an example is empty: {len(wanted)} tokens of output, at most {length} "
            "in all"
        )
    return given, wanted


def _demonstrations(examples: Sequence[tuple[list, list]], length: int) -> list[int]:
    ids: list[int] = []
    for given, wanted in reversed(examples):
        room = length - len(ids) - len(wanted)
        if room < 1:
            break
        ids = given[-room:] + wanted + ids
        if room < len(given):
            break
    return ids


def _padded(rows: Sequence[Sequence], padding: int | bool) -> tuple[Tensor, Tensor]:
    """[B, longest] of the rows, filled on the right, and True where something stood."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    kind = torch.bool if isinstance(padding, bool) else torch.int64
    padded = torch.full(mask.shape, padding, dtype=kind)
    padded[mask] = torch.tensor([each for row in rows for each in row], dtype=kind)
    return padded, mask
