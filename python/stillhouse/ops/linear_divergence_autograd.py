"""The registered ops of the linear divergence: matrix products by chunks of rows, and between them
the divergence kernels, over logits that exist for one chunk at a time.

The products are torch's, everything between them is ours. A chunk costs a product for each side's
logits and one for each gradient; its buffers serve all chunks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import divergence_autograd

# Bytes that a chunk's logits may take, of one side, and the fewest rows of a chunk: products over
# fewer rows are slower (bench, family linear).
_CHUNK_BYTES, _FEWEST_ROWS = 200 << 20, 128


def _chunks(rows: int, columns: int, itemsize: int, limit: int) -> Iterator[slice]:
    """Parts of about equal size of at most `limit` rows each; 0: as measured to be best."""
    limit = limit or max(_FEWEST_ROWS, _CHUNK_BYTES // (columns * itemsize))
    count = max(1, -(-rows // limit))
    size = min(limit, -(-rows // (16 * count)) * 16)
    for start in range(0, rows, size or 1):
        yield slice(start, min(start + size, rows))


_KNOWN_AUTOCAST = ("cpu", "cuda", "xpu", "mps")


def has_autocast(device: str) -> bool:
    """Whether this type of device has autocast: a question that torch.compile cannot trace before
    torch 2.13, where the answer is not known."""
    return device in _KNOWN_AUTOCAST or torch.amp.is_autocast_available(device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of this type are made in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Scratch(threading.local):
    """Buffers of the CPU's chunks, kept by each thread: to touch them for the first time costs as
    much as the kernels between the products."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def __call__(self, side: int, shape: tuple[int, int], like: Tensor) -> Tensor:
        """An uninitialised [rows, columns] for one side's logits."""
        if not like.is_cpu:
            return like.new_empty(shape)
        count = shape[0] * shape[1] * like.itemsize
        buffer = self._buffers.get(side)
        if buffer is None or buffer.numel() < count:
            self._buffers.pop(side, None)
            buffer = torch.empty(count, dtype=torch.uint8, device="cpu")
            if count <= 2 * _CHUNK_BYTES:  # not what a caller's own chunk_rows asks for
                self._buffers[side] = buffer
        return buffer[:count].view(like.dtype).view(shape)


_scratch = _Scratch()


def _add(total: Tensor, x: Tensor, out: Tensor) -> None:
    """out = total + x, rounded to its type once; total may be out."""
    if not x.is_cpu and out.itemsize > total.itemsize:
        out.copy_(total).add_(x)
    elif not x.is_cpu or out.dtype == total.dtype == x.dtype:
        torch.add(total, x, out=out)
    else:  # torch's mixed sum is slow: pieces in cache
        rows = max(1, (4 << 20) // (out[0].numel() * out.itemsize))
        wide, parts = _wide(x.dtype), (each.split(rows) for each in (total, x, out))
        for of_total, of_x, of_out in zip(*parts, strict=True):
            of_out.copy_(of_total.to(wide) + of_x.to(wide))


class _Head:
    """The logits of one side, a chunk at a time, in one buffer."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        vocab: int,
        product: torch.dtype,
        side: int,
    ):
        self.side = side
        columns = len(weight) if vocab < 0 else vocab
        self.hidden = hidden
        self.weight = weight[:columns].to(product)
        self.bias = None if bias is None else bias[:columns].to(product)
        self._buffer: Tensor | None = None

    def inputs(self, rows: slice | Tensor) -> Tensor:
        return self.hidden[rows].to(self.weight.dtype)

    def logits(self, x: Tensor) -> Tensor:
        if self._buffer is None or len(self._buffer) < len(x):
            self._buffer = _scratch(self.side, (len(x), len(self.weight)), x)
        out = self._buffer[: len(x)]
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)


class _Gradients:
    """The gradients that are wanted, as chunks add to them; the others have no element."""

    def __init__(
        self,
        head: _Head,
        weight: Tensor,
        bias: Tensor | None,
        wanted: tuple[bool, bool, bool],
        chunks: int,
        dtypes: tuple[torch.dtype, ...],
    ):
        self.head = head
        hidden_wanted, weight_wanted, bias_wanted = wanted
        # Rows that do not count are not written to.
        shape = head.hidden.shape if hidden_wanted else 0
        self.hidden = head.hidden.new_zeros(shape, dtype=dtypes[0])
        self.bias = weight.new_zeros(len(bias) if bias_wanted else 0, dtype=_wide(weight.dtype))
        self._bias_dtype = dtypes[2]
        self.weight = weight.new_empty(weight.shape if weight_wanted else 0, dtype=dtypes[1])
        self._left = chunks
        self._started = False
        self._sum: Tensor | None = None  # of chunks so far, where it is not in self.weight

    def add(self, rows: slice | Tensor, x: Tensor, gradient: Tensor) -> None:
        """x: the chunk's inputs; gradient: that of its logits."""
        if self.hidden.numel():
            self.hidden[rows] = torch.mm(gradient, self.head.weight).to(self.hidden.dtype)
        if self.bias.numel():
            self.bias[: gradient.shape[1]] += gradient.sum(0, dtype=self.bias.dtype)
        if self.weight.numel():
            self._left -= 1
            self._add_to_weight(gradient.t(), x, self.weight[: gradient.shape[1]])
        self._started = True

    def _add_to_weight(self, gradient: Tensor, x: Tensor, out: Tensor) -> None:
        if x.dtype == out.dtype and (not self._started or x.dtype == _wide(x.dtype)):
            torch.addmm(out, gradient, x, beta=int(self._started), out=out)
            return
        # Products of 16 bits add up in float32. They lie where the teacher's logits of this chunk
        # were, and of two chunks the first one is in its place already.
        product = _scratch(1, tuple(out.shape), x)
        torch.mm(gradient, x, out=product)
        if not self._started:
            out.copy_(product)
        elif self._left == 0 or out.dtype == _wide(x.dtype):
            _add(out if self._sum is None else self._sum, product, out)
        elif self._sum is None:
            self._sum = torch.empty_like(out, dtype=_wide(x.dtype))
            _add(out, product, self._sum)
        else:
            _add(self._sum, product, self._sum)

    def finish(self, unscale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What the chunks have added up to, times `unscale`."""
        if self.weight.numel():
            self.weight[len(self.head.weight) if self._started else 0 :] = 0
        if unscale is not None:
            for gradient in (self.hidden, self.weight, self.bias):
                gradient *= unscale
        return self.hidden, self.weight, self.bias.to(self._bias_dtype)


class Arguments(NamedTuple):
    """What the ops have in common, in the order of their schemas (csrc/ops.cpp)."""

    hidden: Tensor  # [N, H]
    weight: Tensor
    bias: Tensor | None
    teacher: Tensor | None  # logits [N, V], or hidden [N, Ht] where there is a teacher_weight
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    ids: Tensor | None  # [N, k] of a sparse teacher, whose log-probabilities [N, k] `teacher` is
    numbers: Tensor
    labels: Tensor | None
    counted: Tensor | None  # bool [N], the rows to be read; None: all
    kind: int
    tail: int
    vocab: int
    product: torch.dtype | None  # of the student's products; None: the weight's
    teacher_product: torch.dtype | None
    chunk_rows: int  # 0: as measured to be best

    @property
    def result(self) -> torch.dtype:
        teacher = self.teacher if self.teacher_weight is None else self.teacher_weight
        sides = [self.product or self.weight.dtype]
        if teacher is not None:
            sides.append(self.teacher_product or teacher.dtype)
        return torch.float64 if torch.float64 in sides else torch.float32

    @property
    def learning(self) -> tuple[Tensor, Tensor, Tensor]:
        """What gradients are like; the weight stands for a bias that is not there."""
        return self.hidden, self.weight, self.weight if self.bias is None else self.bias

    @property
    def half(self) -> bool:
        """Whether gradients of the loss form come in float32 whatever their tensors are: float16
        has no room for what a loss scale is still to multiply."""
        return (self.product or self.weight.dtype) == torch.float16


_COMMON, _TENSORS = len(Arguments._fields), Arguments._fields.index("kind")


def _check_labels(labels: Tensor | None, columns: int) -> None:
    """As the kernels do, which would count the rows of their chunk."""
    if labels is None or not labels.is_cpu:
        return
    wrong = ((labels < 0) | (labels >= columns)) & (labels != -100)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise RuntimeError(
            f"label {int(labels[row])} of row {row} is outside [0, {columns}) and not -100"
        )


class _Call:
    """The heads of one call, and the rows that count in chunks."""

    def __init__(self, arguments: Arguments):
        a = self.arguments = arguments
        self.head = _Head(a.hidden, a.weight, a.bias, a.vocab, a.product or a.weight.dtype, 0)
        self.teacher = None
        if a.teacher_weight is not None:
            product = a.teacher_product or a.teacher_weight.dtype
            self.teacher = _Head(a.teacher, a.teacher_weight, a.teacher_bias, a.vocab, product, 1)
        _check_labels(a.labels, len(self.head.weight))
        rows, index = len(a.hidden), None
        if a.counted is not None:
            index = a.counted.nonzero()[:, 0]  # waits for the device: the others cost nothing then
            rows, index = len(index), None if len(index) == rows else index
        columns, itemsize = len(self.head.weight), self.head.weight.itemsize
        parts = _chunks(rows, columns, itemsize, a.chunk_rows)
        self.parts = [part if index is None else index[part] for part in parts]

    def __iter__(self) -> Iterator[tuple[slice | Tensor, Tensor, tuple, tuple, dict]]:
        """Rows of a chunk, the head's inputs, and a kernel's arguments: those before the weight of
        the rows, the first the student's logits, those after it, and a sparse teacher's."""
        a = self.arguments
        for rows in self.parts:
            x = self.head.inputs(rows)
            if self.teacher is not None:
                teacher = self.teacher.logits(self.teacher.inputs(rows))
            else:
                teacher = None if a.teacher is None else a.teacher[rows]
            labels = None if a.labels is None else a.labels[rows]
            sparse = {} if a.ids is None else {"ids": a.ids[rows], "tail": a.tail}
            before = (self.head.logits(x), teacher, a.numbers)
            yield rows, x, before, (labels, a.kind, a.vocab), sparse

    def gradients(self, *wanted: bool) -> _Gradients:
        a, chunks = self.arguments, len(self.parts)
        return _Gradients(self.head, a.weight, a.bias, wanted, chunks, _gradient_dtypes(a))

    def stats(self, wanted: bool) -> Tensor:
        a = self.arguments
        return a.hidden.new_zeros((7, len(a.hidden)) if wanted else (0,), dtype=a.result)


def _gradient_dtypes(a: Arguments) -> tuple[torch.dtype, ...]:
    return tuple(torch.float32 if a.half else x.dtype for x in a.learning)


def _implementations(namespace: str) -> dict[str, Any]:
    """The ops over the divergence kernels of a namespace."""
    kernels = getattr(torch.ops, namespace)

    def rows_op(*arguments):
        *common, want_stats, want_hidden = arguments
        call = _Call(a := Arguments(*common))
        value, stats = a.hidden.new_zeros(len(a.hidden), dtype=a.result), call.stats(want_stats)
        gradients = call.gradients(want_hidden, False, False)
        for rows, x, before, after, sparse in call:
            value[rows], of_chunk = kernels.divergence(*before, None, *after, want_stats, **sparse)
            if want_stats:
                stats[:, rows] = of_chunk
            if want_hidden:
                kernels.divergence_loss_(*before, value.new_ones(len(x)), *after, **sparse)
                gradients.add(rows, x, before[0])
        return value, stats, gradients.hidden

    def loss_op(*arguments):
        *common, row_weight, want_stats, want_hidden, want_weight, want_bias = arguments
        call = _Call(a := Arguments(*common))
        loss, stats = a.hidden.new_zeros((), dtype=torch.float64), call.stats(want_stats)
        unscale = None
        if a.half and len(row_weight):
            # float16 holds gradients of rows that weigh about 1.
            unscale = row_weight.abs().amax().clamp(min=1e-30).log2().ceil().exp2()
            row_weight = row_weight / unscale
        gradients = call.gradients(want_hidden, want_weight, want_bias)
        for rows, x, before, after, sparse in call:
            arguments = (*before, row_weight[rows], *after, want_stats)
            part, of_chunk = kernels.divergence_loss_(*arguments, **sparse)
            loss += part
            if want_stats:
                stats[:, rows] = of_chunk
            gradients.add(rows, x, before[0])
        loss = loss if unscale is None else loss * unscale
        return loss.to(a.result), stats, *gradients.finish(unscale)

    def gradient_op(*arguments):
        *common, row_weight, want_hidden, want_weight, want_bias = arguments
        a = Arguments(*common)
        _, _, *gradients = loss_op(*common, row_weight, False, want_hidden, want_weight, want_bias)
        return tuple(g.to(x.dtype) for g, x in zip(gradients, a.learning, strict=True))

    def outside_autocast(op):
        def call(*arguments):
            device = arguments[0].device.type
            if not has_autocast(device):
                return op(*arguments)
            with torch.autocast(device, enabled=False):
                return op(*arguments)

        return call

    ops = {
        "linear_divergence": rows_op,
        "linear_divergence_loss": loss_op,
        "linear_divergence_gradient": gradient_op,
    }
    # The arguments say what the products are made in.
    return {name: outside_autocast(op) for name, op in ops.items()}


def _fake_gradients(a: Arguments, dtypes: Any, *wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        like.new_empty(like.shape if want else 0, dtype=dtype)
        for like, want, dtype in zip(a.learning, wanted, dtypes, strict=True)
    )


def _fake_rows(*arguments):
    *common, want_stats, want_hidden = arguments
    a = Arguments(*common)
    rows = a.hidden.shape[0]
    value = a.hidden.new_empty(rows, dtype=a.result)
    stats = value.new_empty((7, rows) if want_stats else (0,))
    return value, stats, _fake_gradients(a, _gradient_dtypes(a), want_hidden, False, False)[0]


def _fake_gradient(*arguments):
    a = Arguments(*arguments[:_COMMON])
    return _fake_gradients(a, [x.dtype for x in a.learning], *arguments[_COMMON + 1 :])


def _fake_loss(*arguments):
    *common, _, want_stats, want_hidden, want_weight, want_bias = arguments
    value, stats, _ = _fake_rows(*common, want_stats, False)
    a = Arguments(*common)
    gradients = _fake_gradients(a, _gradient_dtypes(a), want_hidden, want_weight, want_bias)
    return value.new_empty(()), stats, *gradients


class _LastDerivative(torch.autograd.Function):
    """A gradient that has none of its own: of `tensors` it would be a wrong one."""

    @staticmethod
    def forward(ctx, gradient, *tensors):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *upstream):
        raise RuntimeError("the gradient of the linear divergence has no gradient of its own")


def _setup(ctx, inputs, output):
    a = Arguments(*inputs[:_COMMON])
    ctx.rest = a[_TENSORS:]
    *_, rows_gradient = output
    ctx.save_for_backward(*a[:_TENSORS], rows_gradient)


def _backward(ctx, upstream, *_):
    *tensors, rows_gradient = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    if wanted == (True, False, False) and rows_gradient.numel():
        # A row's gradient is a multiple of the weight it gets: nothing has to be made again.
        weight = upstream.detach()[:, None]
        gradient = torch.where(weight == 0, 0, rows_gradient.detach() * weight)
        gradient = gradient.to(tensors[0].dtype)
        if torch.is_grad_enabled():
            gradient = _LastDerivative.apply(gradient, tensors[0], upstream)
        gradients = gradient, None, None
    else:
        op = divergence_autograd.kernels().linear_divergence_gradient
        gradients = op(*tensors, *ctx.rest, upstream, *wanted)
    shown = (each if want else None for each, want in zip(gradients, wanted, strict=True))
    return *shown, *([None] * (_COMMON + 2 - 3))


class LossWithGradients(torch.autograd.Function):
    """The loss form: the gradients are made in the forward pass and handed on by the backward."""

    @staticmethod
    def forward(ctx, *inputs):
        loss, stats, *gradients = divergence_autograd.kernels().linear_divergence_loss(*inputs)
        ctx.wanted = inputs[-3:]
        learning = next(x for x, wanted in zip(inputs, ctx.wanted, strict=False) if wanted)
        ctx.save_for_backward(*gradients, learning)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        ctx.mark_non_differentiable(stats)
        ctx.spent = False
        return loss, stats

    @staticmethod
    def backward(ctx, upstream, _):
        if not torch.compiler.is_compiling():
            divergence_autograd.spend(ctx, "linear_divergence_loss")
        learning, gradients = ctx.saved_tensors[-1], list(ctx.saved_tensors[:-1])
        for i, wanted in enumerate(ctx.wanted):
            if not wanted:
                gradients[i] = None
                continue
            divergence_autograd.kernels().scale_(gradients[i], upstream)
            gradients[i] = gradients[i].to(ctx.dtypes[i])
            if torch.is_grad_enabled():
                gradients[i] = _LastDerivative.apply(gradients[i], learning, upstream)
        return *gradients, *([None] * (_COMMON + 5 - 3))


def register(namespace: str) -> None:
    """Implements the ops of this namespace over its kernels."""
    fakes = {
        "linear_divergence": _fake_rows,
        "linear_divergence_gradient": _fake_gradient,
        "linear_divergence_loss": _fake_loss,
    }
    for name, implementation in _implementations(namespace).items():
        torch.library.impl(f"{namespace}::{name}", "default", implementation)
        torch.library.register_fake(f"{namespace}::{name}", fakes[name])
    autograd = torch.library.register_autograd
    autograd(f"{namespace}::linear_divergence", _backward, setup_context=_setup)
    refuse = divergence_autograd.no_second_derivative
    autograd(f"{namespace}::linear_divergence_gradient", refuse)


register("stillhouse")
