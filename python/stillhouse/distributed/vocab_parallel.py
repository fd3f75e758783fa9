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
from stillhouse.ops.divergence_arguments import Call, Number, check_call, loss_weight
from stillhouse.ops.divergence_reference import mix
from stillhouse.ops.kinds import (
    TAID,
    Kind,
    LogAcceptance,
    MSELogits,
    Renyi,
    SoftCrossEntropy,
    as_kind,
)
from stillhouse.ops.row_state import RowState, merge_row_states, tempered

Pair = Number | tuple[Number, Number]


def vocab_parallel_divergence(
    logits_shard: Tensor,
    teacher_shard: Tensor,
    kind: str | Kind = "forward_kl",
    group: dist.ProcessGroup | None = None,
    *,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    logit_softcap: Number | tuple[Number | None, Number | None] | None = None,
    logit_scale: Pair = 1.0,
) -> Tensor:
    """`ops.divergence` of rows whose columns are split over the processes of a group.

    Every process calls it, with the same rows, kind and numbers: as in torch's own collectives,
    what differs is not noticed by all (TORCH_DISTRIBUTED_DEBUG=DETAIL has torch compare shapes),
    and an error on one process leaves the others waiting for it. Padding columns are to be cut off
    both shards.

    Args:
        logits_shard: student logits [..., columns of this process], any dtype of the ops; at least
            one column.
        teacher_shard: the teacher's logits of the same columns; no gradient flows to them.
        kind: one whose value is a sum over columns of what their two probabilities make, or a
            function of it (`Kind.sums_over_columns`), or TAID. Not so: ULD, adaptive KL, DKD,
            standardized KL, cosines, and MSE but of log-probabilities.
        group: the processes; the default group if None.
        temperature, teacher_temperature, logit_softcap, logit_scale: as there.

    Returns:
        one value a row, the same on every process, float32 or float64 as there. The gradient of a
        shard is made in the backward pass without further exchange; each process calls backward
        with the same upstream gradient. A second derivative raises.

    Raises:
        ValueError: a kind that cannot be split, sides that disagree, a teacher with a gradient, a
            group that this process is not in.
        TypeError: a teacher that is no tensor, a group that is none.
        RuntimeError: no process group, or a device without our kernels.
    """
    numbers = temperature, teacher_temperature, logit_softcap, logit_scale
    return _rows(_check(logits_shard, teacher_shard, kind, group, numbers), group, logits_shard)


def vocab_parallel_divergence_loss(
    logits_shard: Tensor,
    teacher_shard: Tensor,
    kind: str | Kind = "forward_kl",
    group: dist.ProcessGroup | None = None,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    denominator: Number | None = None,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    logit_softcap: Number | tuple[Number | None, Number | None] | None = None,
    logit_scale: Pair = 1.0,
) -> Tensor:
    """`ops.divergence_loss` of such rows: sum_n w_n l_n / sum_n w_n, or / `denominator`.

    `weight` float [...] and `mask` bool [...] are the same on every process; a row that they leave
    out has no part in it, whatever it holds. All else, and what is raised, is as in
    `vocab_parallel_divergence`; the gradient is made in the backward pass here, too.
    """
    numbers = temperature, teacher_temperature, logit_softcap, logit_scale
    call = _check(logits_shard, teacher_shard, kind, group, numbers)
    counted = loss_weight(call, mask, weight, denominator, "mean", 0.0)
    value = _rows(call, group, logits_shard)
    return (torch.where(counted == 0, 0, value) * counted).sum()


def _check(
    student: Tensor, teacher: Tensor, kind: str | Kind, group: Any, numbers: tuple[Any, ...]
) -> Call:
    kind = as_kind(kind)
    if not (kind.sums_over_columns or isinstance(kind, TAID)):
        raise ValueError(
            f"{type(kind).__name__} cannot be split over the vocabulary: it is no sum over columns "
            "of what their two probabilities make"
        )
    if not isinstance(teacher, Tensor):
        raise TypeError(f"teacher_shard must be logits, got {type(teacher).__name__}")
    if teacher.requires_grad:
        raise ValueError("no gradient flows to the teacher: detach its logits")
    if isinstance(student, Tensor) and student.shape[-1:] != teacher.shape[-1:]:
        raise ValueError(
            f"the student's shard has {student.shape[-1]} columns and the teacher's "
            f"{teacher.shape[-1]}: a process has the same columns of both, without padding"
        )
    temperature, teacher_temperature, softcap, scale = numbers
    of_call = temperature, teacher_temperature, None, softcap, scale, None, 0.0
    call = check_call(student, teacher, kind, *of_call)
    if not divergence_autograd.has_kernel(student):
        raise RuntimeError(f"there is no kernel for tensors on {student.device.type}")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("no process group: torch.distributed.init_process_group comes first")
    if dist.get_world_size(group) < 1:
        raise ValueError("this process is not in the group that it is to work with")
    return call


def _rows(call: Call, group: dist.ProcessGroup | None, logits: Tensor) -> Tensor:
    if isinstance(call.kind, TAID):
        call = _towards_target(call)
    if isinstance(call.kind, MSELogits):  # a mean over all columns, not over those at hand
        columns = torch.tensor(float(logits.shape[-1]), device=logits.device)
        dist.all_reduce(columns, group=group)
        numbers = call.numbers.clone()
        numbers[-1] = 1 / columns.double()
        call = call._replace(numbers=numbers)
    return _VocabParallel.apply(call, group, logits)


def _towards_target(call: Call) -> Call:
    """TAID as what it is, the cross-entropy to a target between student and teacher."""
    t = call.numbers[8].to(call.student.device)
    z, teacher = (tempered(x, call.numbers, side) for side, x in enumerate(call[:2]))
    target = mix(t, teacher, z)
    numbers = call.numbers.clone()
    numbers[[1, 3]], numbers[5] = 1.0, 0.0  # the target's temperature and scale, and no cap
    return call._replace(teacher=target.to(call.result), kind=SoftCrossEntropy(), numbers=numbers)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, group: dist.ProcessGroup | None, logits: Tensor) -> Tensor:
        number = call.kind.kernel_number
        kernels = divergence_autograd.kernels()
        student, teacher = logits.detach(), call.teacher
        own = kernels.row_state(student, teacher, call.numbers, None)
        whole = merge_row_states(*_gather(own, group))
        lse = torch.stack([whole.student_lse, whole.teacher_lse])
        sums = kernels.divergence_part(student, teacher, call.numbers, lse, number)
        dist.all_reduce(sums, group=group)
        value, slope = sums
        value, factor = _finish(call.kind, value, slope)
        ctx.save_for_backward(logits, teacher, lse, slope, factor)
        ctx.numbers, ctx.number = call.numbers, number
        return (value * call.numbers[-1]).to(call.result)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[None, None, Tensor]:
        logits, teacher, lse, slope, factor = ctx.saved_tensors
        # A row that does not count may have a factor that is not finite.
        weight = torch.where(upstream == 0, 0, upstream.double() * factor).to(upstream.dtype)
        op = divergence_autograd.kernels().divergence_part_gradient
        return None, None, op(logits, teacher, ctx.numbers, lse, slope, weight, ctx.number)


def _gather(own: Tensor, group: dist.ProcessGroup | None) -> list[RowState]:
    """The states of all processes, in the order of their ranks on each of them; without crosses,
    which nothing needs here."""
    packed = own[:4].contiguous()
    every = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, packed, group=group)
    nothing = torch.zeros_like(packed[0])
    return [RowState(*each.unbind(), nothing, nothing) for each in every]


def _finish(kind: Kind, value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """D and its derivative with respect to the sum of terms, of kinds that are a function of it
    (csrc/divergence: kinds.h, powers.h)."""
    if isinstance(kind, LogAcceptance):
        acceptance = value.clamp(max=1)
        return -acceptance.log(), -1 / acceptance
    if isinstance(kind, Renyi):
        a = torch.as_tensor(kind.parameters[0]).reshape(()).to(value)
        change, power = a * (a - 1) * value, -a * slope
        near = (change > -0.5) & (change < 1)
        log_power = torch.where(near, torch.log1p(change.clamp(min=-0.5)), power.log())
        return log_power / (a - 1), a / torch.where(near, 1 + change, power)
    return value, torch.ones_like(value)
