"""Row divergences where each process has the logits of some columns of every row.

What processes tell each other is a few float64 numbers a row: first the states of their parts,
which give the log-sum-exps of whole rows; then the sums of the divergence's terms and slopes over
their columns. With these numbers each makes the gradient of its own columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stillhouse.ops import divergence_autograd
from stillhouse.ops.divergence_arguments import Call, Number, check_call, check_rows
from stillhouse.ops.kinds import Kind, LogAcceptance, Renyi, as_kind
from stillhouse.ops.row_state import RowState, merge_row_states

# Kinds whose terms depend on a column's two probabilities alone.
_SPLIT = (*range(1, 6), *range(7, 16), 23)


def vocab_parallel_divergence(
    logits_shard: Tensor,
    teacher_shard: Tensor,
    kind: str | Kind = "forward_kl",
    group: dist.ProcessGroup | None = None,
    *,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    logit_softcap: Any = None,
    logit_scale: Any = 1.0,
) -> Tensor:
    """`ops.divergence` of rows whose columns are split over the processes of a group.

    Args:
        logits_shard: student logits [..., columns of this process], any dtype of the ops; the same
            rows on every process, and at least one column each.
        teacher_shard: the teacher's logits of the same columns; no gradient flows to them.
        kind: any but those that look at whole rows in another way (ULD, adaptive KL, DKD, TAID,
            distances of logits).
        group: the processes; the default group if None.
        temperature, teacher_temperature, logit_softcap, logit_scale: as there, the same on every
            process.

    Returns:
        one value a row, the same on every process, float32 or float64 as there. The gradient of a
        shard is made in the backward pass without further exchange; each process calls backward
        with the same upstream gradient. A second derivative raises.

    Raises:
        ValueError: a kind that cannot be split, shards that disagree, a teacher with a gradient.
        RuntimeError: no process group, or a device without our kernels.
    """
    call = _check(
        logits_shard,
        teacher_shard,
        kind,
        (temperature, teacher_temperature, logit_softcap, logit_scale),
    )
    return _VocabParallel.apply(call, group, logits_shard)


def vocab_parallel_divergence_loss(
    logits_shard: Tensor,
    teacher_shard: Tensor,
    kind: str | Kind = "forward_kl",
    group: dist.ProcessGroup | None = None,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    denominator: Number | None = None,
    **options: Any,
) -> Tensor:
    """`ops.divergence_loss` of such rows: sum_n w_n l_n / sum_n w_n, or / `denominator`.

    `weight` float [...] and `mask` bool [...] are the same on every process; `options` as in
    `vocab_parallel_divergence`, which says what is returned and raised.
    """
    value = vocab_parallel_divergence(logits_shard, teacher_shard, kind, group, **options)
    counted = torch.ones_like(value)
    if weight is not None:
        if weight.requires_grad:
            raise ValueError("weight is not differentiable: detach it")
        check_rows("weight", weight, logits_shard, weight.dtype)
        counted = weight.to(value)
    if mask is not None:
        check_rows("mask", mask, logits_shard, torch.bool)
        counted = torch.where(mask, counted, 0)
    total = counted.sum() if denominator is None else torch.as_tensor(denominator).to(value)
    # A row that does not count has no part in it, whatever it holds; no row, no loss.
    weighted = torch.where(counted == 0, 0, value) * counted
    return weighted.sum() / torch.where(total == 0, 1, total)


def _check(student: Tensor, teacher: Tensor, kind: str | Kind, options: tuple) -> Call:
    kind = as_kind(kind)
    if kind.kernel_number not in _SPLIT:
        raise ValueError(
            f"{type(kind).__name__} cannot be split over the vocabulary: it looks at whole rows"
        )
    if not isinstance(teacher, Tensor):
        raise TypeError(f"teacher_shard must be logits, got {type(teacher).__name__}")
    if teacher.requires_grad:
        raise ValueError("no gradient flows to the teacher: detach its logits")
    temperature, teacher_temperature, softcap, scale = options
    numbers = temperature, teacher_temperature, None, softcap, scale, None, 0.0
    call = check_call(student, teacher, kind, *numbers)
    if not divergence_autograd.has_kernel(student):
        raise RuntimeError(f"there is no kernel for tensors on {student.device.type}")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("no process group: torch.distributed.init_process_group comes first")
    return call


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, group: dist.ProcessGroup | None, logits: Tensor) -> Tensor:
        number = call.kind.kernel_number
        kernels = divergence_autograd.kernels()
        student, teacher = logits.detach(), call.teacher
        own = RowState(*kernels.row_state(student, teacher, call.numbers, None).unbind())
        whole = merge_row_states(*_gather(own, group))
        lse = torch.stack([whole.student_lse, whole.teacher_lse])
        sums = kernels.divergence_part(student, teacher, call.numbers, lse, number)
        dist.all_reduce(sums, group=group)
        value, slope = sums
        value, factor = _finish(call.kind, value, slope)
        ctx.save_for_backward(logits, teacher, lse, slope, factor)
        ctx.numbers, ctx.number = call.numbers, number
        return (value * float(call.numbers[-1])).to(call.result)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[None, None, Tensor]:
        logits, teacher, lse, slope, factor = ctx.saved_tensors
        weight = (upstream.double() * factor).to(upstream.dtype)
        op = divergence_autograd.kernels().divergence_part_gradient
        return None, None, op(logits, teacher, ctx.numbers, lse, slope, weight, ctx.number)


def _gather(own: RowState, group: dist.ProcessGroup | None) -> list[RowState]:
    """The states of all processes, in the order of their ranks on each of them."""
    packed = torch.stack(own)
    every = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, packed, group=group)
    return [RowState(*each.unbind()) for each in every]


def _finish(kind: Kind, value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """D and its derivative with respect to the sum of terms, of kinds that are a function of it
    (csrc/divergence: kinds.h, powers.h)."""
    if isinstance(kind, LogAcceptance):
        acceptance = value.clamp(max=1)
        return -acceptance.log(), -1 / acceptance
    if isinstance(kind, Renyi):
        a = kind.parameters[0]
        change, power = a * (a - 1) * value, -a * slope
        near = (change > -0.5) & (change < 1)
        log_power = torch.where(near, torch.log1p(change.clamp(min=-0.5)), power.log())
        return log_power / (a - 1), a / torch.where(near, 1 + change, power)
    return value, torch.ones_like(value)
