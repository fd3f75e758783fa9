"""What a part of the vocabulary says of whole rows: states that merge, the basis of sharding it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .divergence_arguments import Call, check_call, check_rows
from .divergence_autograd import has_kernel, kernels, warn_without_kernel
from .kinds import Number
from .sparse_teacher import SparseTeacher


class RowState(NamedTuple):
    """What some columns of each row add up to; float64 [...] each, no gradient.

    With tempered logits z and t of student and teacher, relative to their maxima over these columns
    (-inf where there is none):

        student_sum = sum e^z,   student_cross = sum e^z (z - t),   and the teacher's the other way.

    `torch.stack(state)` is one tensor to send, `RowState(*tensor)` the way back.
    """

    student_max: Tensor
    student_sum: Tensor
    teacher_max: Tensor
    teacher_sum: Tensor
    student_cross: Tensor
    teacher_cross: Tensor

    @property
    def student_lse(self) -> Tensor:
        """Log-sum-exp of the student's tempered logits."""
        return self.student_max + self.student_sum.log()

    @property
    def teacher_lse(self) -> Tensor:
        """That of the teacher's; -inf of a state without a teacher."""
        return self.teacher_max + self.teacher_sum.log()

    @property
    def forward_kl(self) -> Tensor:
        """KL(teacher || student) of rows whose columns are all in the state; right to 1e-6 nats for
        float32 logits, which `ops.divergence` betters near 0."""
        return self.teacher_cross / self.teacher_sum + (self.student_sum / self.teacher_sum).log()

    @property
    def reverse_kl(self) -> Tensor:
        """KL(student || teacher), likewise."""
        return self.student_cross / self.student_sum + (self.teacher_sum / self.student_sum).log()


def row_state(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    mask: Tensor | None = None,
    logit_softcap: Number | tuple[Number | None, Number | None] | None = None,
    logit_scale: Number | tuple[Number, Number] = 1.0,
) -> RowState:
    """The state of a part of the vocabulary, from one read of its logits.

    Args as in `divergence`: student_logits and teacher_logits [..., columns of this part], or the
    student's alone. A row with mask False, and one without a finite logit, has the state of no
    column, which changes nothing that it is merged with.

    Raises ValueError and TypeError as `divergence` does.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> z, t = torch.randn(2, 3, 10).unbind(0)
        >>> parts = [ops.row_state(z[:, :4], t[:, :4]), ops.row_state(z[:, 4:], t[:, 4:])]
        >>> whole = ops.merge_row_states(*parts)
        >>> bool(torch.allclose(whole.forward_kl, ops.divergence(z, t).double(), atol=1e-6))
        True
    """
    if isinstance(teacher_logits, SparseTeacher):
        raise TypeError("the state of a part of the vocabulary takes the teacher's logits there")
    if teacher_logits is not None and teacher_logits.shape[-1:] != student_logits.shape[-1:]:
        raise ValueError(
            f"the student has {student_logits.shape[-1]} columns here and the teacher "
            f"{teacher_logits.shape[-1]}: a part has the same columns of both, without padding"
        )
    call = check_call(
        student_logits,
        student_logits if teacher_logits is None else teacher_logits,
        "forward_kl",
        temperature,
        teacher_temperature,
        None,
        logit_softcap,
        logit_scale,
        None,
        0.0,
    )
    if mask is not None:
        check_rows("mask", mask, student_logits, torch.bool)
    if not has_kernel(student_logits):
        return _plain(call, teacher_logits is not None, mask)
    teacher = None if teacher_logits is None else teacher_logits.detach()
    states = kernels().row_state(student_logits.detach(), teacher, call.numbers, mask)
    return RowState(*states.unbind(0))


def _plain(call: Call, two_sides: bool, mask: Tensor | None) -> RowState:
    """In plain torch, for a device without the kernel, which is said."""
    warn_without_kernel(call.student)

    def relative(x: Tensor, side: int) -> tuple[Tensor, Tensor]:
        x = tempered(x, call.numbers, side)
        top = x.amax(-1, keepdim=True)
        return x - torch.where(top > -torch.inf, top, 0), top[..., 0]

    (z, z_max), (t, t_max) = relative(call.student, 0), relative(call.teacher, 1)

    def cross(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > -torch.inf, a.exp() * (a - b), a.exp()).sum(-1)

    state = [z_max, z.exp().sum(-1), t_max, t.exp().sum(-1), cross(z, t), cross(t, z)]
    if not two_sides:
        nothing = torch.zeros_like(z_max)
        state[2:] = [nothing - torch.inf, nothing, nothing, nothing]
    if mask is not None:
        empty = (-torch.inf, 0, -torch.inf, 0, 0, 0)
        state = [torch.where(mask, x, none) for x, none in zip(state, empty, strict=True)]
    return RowState(*state)


def tempered(x: Tensor, numbers: Tensor, side: int) -> Tensor:
    """Logits of the student (side 0) or the teacher (1) as a call's numbers have them: scaled,
    capped, divided by the temperature; float64, no gradient."""
    number = numbers.to(x.device).unbind()
    x, cap = x.detach().double() * number[2 + side], number[4 + side]
    capped = torch.where(x > -torch.inf, cap * torch.tanh(x / torch.where(cap > 0, cap, 1)), x)
    return torch.where(cap > 0, capped, x) / number[side]


def merge_row_states(*states: RowState) -> RowState:
    """The state of the columns of all states, whose rows agree. Associative and commutative up to
    rounding, in float64.

    Raises ValueError without a state and for rows that differ.
    """
    if not states:
        raise ValueError("merge_row_states needs at least one state")
    shapes = {tuple(state.student_max.shape) for state in states}
    if len(shapes) > 1:
        raise ValueError(f"states of different rows do not merge, got {sorted(shapes)}")
    maxima = [torch.stack([getattr(s, f"{side}_max") for s in states]) for side in _SIDES]
    student_max, teacher_max = (m.amax(0) for m in maxima)
    sums = torch.zeros(4, *student_max.shape, dtype=torch.float64, device=student_max.device)
    for state in states:
        sums += _moved(state, student_max, teacher_max)
    student_sum, teacher_sum, student_cross, teacher_cross = sums
    return RowState(
        student_max, student_sum, teacher_max, teacher_sum, student_cross, teacher_cross
    )


_SIDES = ("student", "teacher")


def _moved(state: RowState, student_max: Tensor, teacher_max: Tensor) -> Tensor:
    """Sums and crosses [4, ...] relative to maxima that are not smaller."""

    def step(own: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
        some = own > -torch.inf
        difference = torch.where(some, own - torch.where(some, to, 0), 0)
        return difference, torch.where(some, difference.exp(), 0)

    (dz, ez), (dt, et) = step(state.student_max, student_max), step(state.teacher_max, teacher_max)

    def scaled(factor: Tensor, x: Tensor) -> Tensor:
        # 0 inf = 0, but a NaN stays one.
        return torch.where((factor > 0) | x.isnan(), factor * x, factor)

    return torch.stack(
        [
            scaled(ez, state.student_sum),
            scaled(et, state.teacher_sum),
            scaled(ez, state.student_cross + state.student_sum * (dz - dt)),
            scaled(et, state.teacher_cross + state.teacher_sum * (dt - dz)),
        ]
    )
