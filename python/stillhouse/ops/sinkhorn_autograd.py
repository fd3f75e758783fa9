"""The registered ops of entropic transport: their shapes for the compiler, their derivatives.

All ride on one kernel (csrc/sinkhorn). Numbers that may change during training travel in a float64
[5] tensor, so that nothing recompiles.
"""

from __future__ import annotations

import torch

from . import divergence_autograd

# In the order of the kernel's numbers (csrc/sinkhorn/kernel.h).
GROUNDS = ("matrix", "l1", "sqeuclidean", "euclidean")
DOMAINS = ("auto", "kernel", "log")
VALUES = ("transport", "entropic")
GRADIENTS = ("unrolled", "implicit", "envelope")


def wide_type(x):
    """The dtype of results: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_sinkhorn(
    cost, other, a, b, lengths, numbers, iterations, ground, domain, objective, gradient, plan
):
    groups, n, m = *cost.shape[:2], cost.shape[2] if other is None else other.shape[1]

    def output(*shape, wanted=True, dtype=None):
        return cost.new_empty(shape if wanted else (0,), dtype=dtype or wide_type(cost))

    return (
        output(groups),
        output(groups, n, m, wanted=plan),
        output(groups, n),
        output(groups, m),
        output(groups, dtype=torch.int64),
        output(groups),
        output(groups, iterations, n + m, wanted=gradient == GRADIENTS.index("unrolled")),
    )


def _fake_gradient(upstream, cost, other, *rest):
    want_cost, want_other, want_marginals = rest[-3:]
    m = cost.shape[2] if other is None else other.shape[1]

    def output(wanted, like, *shape, dtype=None):
        return like.new_empty(shape if wanted else (0,), dtype=dtype or like.dtype)

    return (
        output(want_cost, cost, *cost.shape),
        output(want_other, cost, *(() if other is None else other.shape)),
        output(want_marginals, cost, *cost.shape[:2], dtype=wide_type(cost)),
        output(want_marginals, cost, cost.shape[0], m, dtype=wide_type(cost)),
    )


class Solved(torch.autograd.Function):
    """value, plan, f, g, iterations_used and marginal_error, of which the first has a gradient.

    A function and not the op's own derivative: torch's way through that costs as much as a hundred
    small problems.
    """

    @staticmethod
    def forward(ctx, call, ground, want_plan, cost, other, a, b):
        """`call` has `lengths`, `numbers` and the words of a call; the tensors are for autograd to
        see."""
        words = call.iterations, ground, call.domain, call.value
        value, plan, f, g, used, error, history = divergence_autograd.kernels().sinkhorn(
            cost, other, a, b, call.lengths, call.numbers, *words, call.gradient, want_plan
        )
        ctx.save_for_backward(cost, other, a, b, call.lengths, call.numbers, f, g, used, history)
        ctx.words = *words, call.gradient
        ctx.mark_non_differentiable(plan, f, g, used, error)
        ctx.set_materialize_grads(False)  # zeros for each of these
        return value, plan, f, g, used, error

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * 7
        of_cost, of_other, of_a, of_b = wanted = ctx.needs_input_grad[3:]
        found = divergence_autograd.kernels().sinkhorn_gradient(
            upstream,
            *ctx.saved_tensors,
            *ctx.words,
            of_cost,
            of_other,
            of_a or of_b,
        )
        shown = [each if want else None for each, want in zip(found, wanted, strict=True)]
        if torch.is_grad_enabled():  # somebody will ask for a second derivative
            learning = [x for x in ctx.saved_tensors[:4] if x is not None and x.requires_grad]
            shown = [
                x if x is None else _LastDerivative.apply(x, upstream, *learning) for x in shown
            ]
        return None, None, None, *shown


class _LastDerivative(torch.autograd.Function):
    """A gradient as a function of what it was made from, which has no derivative."""

    @staticmethod
    def forward(ctx, gradient, *made_from):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *upstream):
        raise RuntimeError("the gradient of a transport problem has no gradient of its own")


def _setup_pairs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_pairs(ctx, upstream):
    x, y = ctx.saved_tensors
    op = divergence_autograd.kernels().pairwise_l1_gradient
    found = op(upstream.contiguous(), x, y, *ctx.needs_input_grad)
    shown = zip(found, ctx.needs_input_grad, strict=True)
    return tuple(each if wanted else None for each, wanted in shown)


def _fake_pairs_gradient(upstream, x, y, want_x, want_y):
    return tuple(
        each.new_empty(each.shape if want else (0,)) for each, want in ((x, want_x), (y, want_y))
    )


def _no_second_derivative(ctx, *upstream):
    raise RuntimeError("the gradient of L1 distances has no gradient of its own")


def register(namespace: str) -> None:
    """Shapes and derivatives of the ops whose schemas csrc/ops.cpp has put into this namespace."""
    fakes = {
        "sinkhorn": _fake_sinkhorn,
        "sinkhorn_gradient": _fake_gradient,
        "pairwise_l1": lambda x, y: x.new_empty((*x.shape[:2], y.shape[1]), dtype=wide_type(x)),
        "pairwise_l1_gradient": _fake_pairs_gradient,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
    autograd = torch.library.register_autograd
    autograd(f"{namespace}::pairwise_l1", _backward_pairs, setup_context=_setup_pairs)
    autograd(f"{namespace}::pairwise_l1_gradient", _no_second_derivative)


register("stillhouse")
