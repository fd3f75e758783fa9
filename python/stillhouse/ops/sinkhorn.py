"""Entropic optimal transport between weighted sets: many small problems at once, or a few large."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import divergence_autograd
from .divergence_arguments import pack, positive
from .divergence_autograd import has_kernel
from .kinds import Number
from .sinkhorn_autograd import DOMAINS, GRADIENTS, GROUNDS, VALUES, Solved, wide_type
from .sinkhorn_reference import reference

_SLACK = 1e-4  # relative, between the total masses of two marginals
_KERNEL_RANGE = 80.0  # of costs over epsilon: e^-80 is a normal float
_NO_GRADIENT = -1


class Transport(NamedTuple):
    """What `sinkhorn` has found. float32, or float64 for float64 costs; gradients flow from `value`
    alone."""

    value: Tensor  # [G]
    plan: Tensor | None  # [G, n, m]
    f: Tensor  # [G, n], potentials in units of the costs: P = e^((f_i + g_j - C_ij) / epsilon)
    g: Tensor  # [G, m]
    iterations_used: Tensor  # int64 [G]
    # [G], of the rows: max |P 1 - a|, or |P 1 - a e^(-f / rho)|; columns are exact
    marginal_error: Tensor


def sinkhorn(
    cost: Tensor,
    epsilon: Number,
    *,
    iterations: int = 20,
    a: Tensor | None = None,
    b: Tensor | None = None,
    tolerance: float | None = None,
    domain: str = "auto",
    gradient: str = "unrolled",
    value: str = "transport",
    lengths: Tensor | None = None,
    rho: Number | tuple[Number | None, Number | None] | None = None,
    annealing: Number | None = None,
    return_plan: bool = True,
) -> Transport:
    """Sinkhorn's iterations u = a / (K v), v = b / (K^T u) with K = e^(-cost / epsilon), for each
    of G problems (Cuturi, arXiv 1306.0895).

    Args:
        cost: [G, n, m], non-negative, any float dtype; an infinite cost forbids the pair.
        epsilon: weight of the entropy, in units of the costs.
        iterations: of rows and then columns.
        a, b: marginals [G, n] and [G, m], or [n] and [m] for all problems; non-negative, of the
            same total mass. All ones if None, which needs n = m.
        tolerance: a problem is done as soon as max |P 1 - a| is not above it, which is looked at
            every 5 iterations. None: all iterations.
        domain: "kernel" works with K itself, "log" with potentials, which no epsilon is too small
            for. "auto" takes the first where costs / epsilon stay below 80.
        gradient: "unrolled" differentiates the iterations, as autograd would, from their scalings
            alone; "implicit" differentiates the fixed point that they go to (right as far as they
            have come there; of marginals up to a constant); "envelope" takes the plan for it, which
            is right at the fixed point, and of the entropic value only.
        value: "transport" is <P, C>, "entropic" <P, C> + epsilon sum P (log P - 1), which the
            iterations minimise.
        lengths: int64 [G], or [G, 2] for rows and columns: only so many of them count. What lies
            beyond has no mass, potential or gradient.
        rho: marginals may give way, at the price rho KL(P 1 || a) and rho KL(P^T 1 || b) (Chizat et
            al., arXiv 1607.05816; they are part of the entropic value); a pair for both sides, None
            for a side that is kept. Total masses may differ then.
        annealing: a factor in (0, 1): iteration k works at the largest cost times its k-th power,
            until that is below epsilon.
        return_plan: False leaves the plan out.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that disagree, n or m = 0, numbers out of range, unknown words,
            "envelope" of the transport value; and, where looking at them does not make an
            accelerator wait, costs below 0 or NaN, marginals below 0 or without any mass, masses
            that differ, lengths out of range, domain "kernel" for costs / epsilon above 80.
        RuntimeError: a second derivative.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> ops.sinkhorn(torch.tensor([[[0.2, 0.6], [0.5, 0.1]]]), 0.1).value
        tensor([0.3144])
    """
    _check_tensor("cost", cost, "[G, n, m]")
    settings = _settings(epsilon, iterations, tolerance, domain, gradient, value, rho, annealing)
    call = _with_sides(settings, cost, cost.shape[1:], a, b, lengths)
    if domain == "kernel":
        _check_range(cost, epsilon)
    return _solve(cost, None, GROUNDS.index("matrix"), call, return_plan)


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    epsilon: Number,
    *,
    cost: str = "sqeuclidean",
    iterations: int = 20,
    a: Tensor | None = None,
    b: Tensor | None = None,
    tolerance: float | None = None,
    domain: str = "auto",
    gradient: str = "unrolled",
    value: str = "transport",
    lengths: Tensor | None = None,
    rho: Number | tuple[Number | None, Number | None] | None = None,
    annealing: Number | None = None,
    debias: bool = False,
) -> Transport:
    """`sinkhorn` of clouds of points x [G, n, d] and y [G, m, d], whose costs are made in each
    sweep: no [n, m] tensor exists, and there is no plan.

    Args:
        cost: "l1" (sum |x - y|), "sqeuclidean" (sum (x - y)^2) or "euclidean" (its root, whose
            gradient is 0 where points meet).
        debias: the value less half of those of (x, x) and (y, y), with their own marginals: 0 for
            equal clouds (Genevay et al., arXiv 1706.00292). Of marginals that are kept alone.

    The other arguments, and what is returned and raised, are those of `sinkhorn`.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> x = torch.tensor([[[0.0], [1.0]]])
        >>> ops.sinkhorn_points(x, x + 2, 0.01, cost="l1").value
        tensor([4.])
    """
    _check_tensor("x", x, "[G, n, d]")
    _check_tensor("y", y, "[G, m, d]")
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2] or x.dtype != y.dtype:
        raise ValueError(
            f"x and y must have the same G, d and dtype, got {tuple(x.shape)} {x.dtype} and "
            f"{tuple(y.shape)} {y.dtype}"
        )
    if x.device != y.device:
        raise ValueError(f"x is on {x.device}, y on {y.device}")
    if cost not in GROUNDS[1:]:
        raise ValueError(f"cost must be one of {', '.join(GROUNDS[1:])}, got {cost!r}")
    if debias and rho is not None:
        raise ValueError("debias is defined for marginals that are kept: it does not go with rho")

    settings = _settings(epsilon, iterations, tolerance, domain, gradient, value, rho, annealing)

    def solve(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, lengths: Tensor | None):
        call = _with_sides(settings, x, (x.shape[1], y.shape[1]), a, b, lengths)
        return _solve(x, y, GROUNDS.index(cost), call, False)

    found = solve(x, y, a, b, lengths)
    if not debias:
        return found
    sides = (None, None) if lengths is None else _pairs(lengths).unbind(-1)
    own = [
        solve(points, points, mass, mass, length).value
        for points, mass, length in zip((x, y), (a, b), sides, strict=True)
    ]
    return found._replace(value=found.value - 0.5 * (own[0] + own[1]))


def pairwise_l1(x: Tensor, y: Tensor) -> Tensor:
    """sum_k |x_ik - y_jk|: [n, m] of rows [n, d] and [m, d], or [G, n, m] of [G, n, d] and
    [G, m, d]; float32, or float64 as they are. No tensor of all differences exists, in the
    gradient neither; that is 0 where entries are equal.

    Raises TypeError for a wrong dtype and ValueError for shapes that disagree.

    Example:
        >>> import torch
        >>> from stillhouse import ops
        >>> ops.pairwise_l1(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 2.0], [0.0, 0.0]]))
        tensor([[3., 1.]])
    """
    _check_floating(x=x, y=y)
    same = x.dim() == y.dim() and x.dim() in (2, 3) and x.shape[-1] == y.shape[-1]
    if not same or x.shape[:-2] != y.shape[:-2] or x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            "x and y must be [n, d] and [m, d], or [G, n, d] and [G, m, d], of one dtype and "
            f"device, got {tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}"
        )
    if not has_kernel(x):
        divergence_autograd.warn_without_kernel(x, "distance")
        return torch.cdist(x.to(wide_type(x)), y.to(wide_type(x)), p=1)
    if x.dim() == 3:
        return divergence_autograd.kernels().pairwise_l1(x, y)
    return divergence_autograd.kernels().pairwise_l1(x[None], y[None])[0]


# ---- checks


def _check_floating(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {found}")


def _check_tensor(name: str, x: Tensor, shape: str) -> None:
    _check_floating(**{name: x})
    if len(x.shape) != 3 or 0 in x.shape[1:]:
        raise ValueError(f"{name} must be {shape} with no size 0, got {tuple(x.shape)}")


class _Call(NamedTuple):
    """The checked arguments, as the registered op takes them."""

    numbers: Tensor
    iterations: int
    domain: int
    value: int
    gradient: int
    is_balanced: bool
    a: Tensor | None = None
    b: Tensor | None = None
    lengths: Tensor | None = None


def _can_look(x: Tensor) -> bool:
    return x.is_cpu and not torch.compiler.is_compiling()


def _pairs(lengths: Tensor) -> Tensor:
    return lengths if lengths.dim() == 2 else lengths[:, None].expand(-1, 2)


# Calls whose settings are plain numbers, by these. Between two calls the rest of a training step
# puts this code out of the caches: to check and pack the same numbers again costs as much as 20
# problems.
_known: dict[tuple, _Call] = {}
_MOST_KNOWN = 64


def _settings(*given: Any) -> _Call:
    """A call without its marginals and lengths."""
    if torch.compiler.is_compiling():
        return _check_settings(*given)
    key = (type(given[1]), *given)
    try:
        call = _known.get(key)
    except TypeError:  # what has no hash is no number
        call = None
    if call is None:
        call = _check_settings(*given)
        if _lasts(call.numbers) and not _has_tensors(given):
            if len(_known) >= _MOST_KNOWN:
                _known.clear()
            _known[key] = call
    return call


def _has_tensors(given: tuple) -> bool:
    return any(isinstance(x, Tensor) or (isinstance(x, tuple) and _has_tensors(x)) for x in given)


def _lasts(x: Tensor) -> bool:
    """Whether a tensor made here is like any other once the modes end that it was made in."""
    wrapped = torch._C._are_functorch_transforms_active()
    return type(x) is Tensor and not x.is_inference() and not wrapped


def _check_settings(
    epsilon: Number,
    iterations: int,
    tolerance: float | None,
    domain: str,
    gradient: str,
    value: str,
    rho: Any,
    annealing: Number | None,
) -> _Call:
    for name, word, known in (
        ("domain", domain, DOMAINS),
        ("gradient", gradient, GRADIENTS),
        ("value", value, VALUES),
    ):
        if word not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {word!r}")
    if gradient == "envelope" and value == "transport":
        raise ValueError(
            'gradient="envelope" is that of value="entropic": of <P, C> it is off by a third'
        )
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be an integer of at least 1, got {iterations!r}")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a number of at least 0, got {tolerance}")
    if annealing is not None and not isinstance(annealing, Tensor) and not 0 < annealing < 1:
        raise ValueError(f"annealing must be a factor in (0, 1), got {annealing}")
    rhos = rho if isinstance(rho, tuple) else (rho, rho)
    if len(rhos) != 2:
        raise ValueError(f"rho must be a number or a pair (rows, columns), got {rho}")
    numbers = [
        positive("epsilon", epsilon),
        *(math.inf if each is None else positive("rho", each) for each in rhos),
        0.0 if annealing is None else annealing,
        -1.0 if tolerance is None else tolerance,
    ]
    words = DOMAINS.index(domain), VALUES.index(value), GRADIENTS.index(gradient)
    return _Call(pack(numbers), iterations, *words, is_balanced=rhos == (None, None))


def _with_sides(
    call: _Call,
    x: Tensor,
    sizes: tuple[int, int],
    a: Tensor | None,
    b: Tensor | None,
    lengths: Tensor | None,
) -> _Call:
    """The call for costs or points `x` with these marginals."""
    n, m = sizes
    if a is b is lengths is None:
        if call.is_balanced and n != m:
            raise ValueError(
                f"marginals of ones need n = m, got {n} and {m}: pass a and b of the same total "
                "mass"
            )
        return call
    a, b = _marginal("a", a, x, n), _marginal("b", b, x, m)
    if lengths is not None:
        lengths = _check_lengths(lengths, x, sizes)
    if _can_look(x) and len(x):
        _check_masses(x, sizes, (a, b), lengths, call.is_balanced)
    return call._replace(a=a, b=b, lengths=lengths)


def _marginal(name: str, given: Tensor | None, x: Tensor, count: int) -> Tensor | None:
    if given is None:
        return None
    _check_floating(**{name: given})
    if tuple(given.shape) not in ((count,), (x.shape[0], count)):
        raise ValueError(
            f"{name} must be [{x.shape[0]}, {count}] or [{count}], got {tuple(given.shape)}"
        )
    if given.device != x.device:
        raise ValueError(f"{name} is on {given.device}, the costs on {x.device}")
    return given.to(wide_type(x)).expand(x.shape[0], count)


def _check_lengths(lengths: Tensor, x: Tensor, sizes: tuple[int, int]) -> Tensor:
    groups, (n, m) = x.shape[0], sizes
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
        found = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths must be an int64 tensor, got {found}")
    if tuple(lengths.shape) not in ((groups,), (groups, 2)):
        raise ValueError(f"lengths must be [{groups}] or [{groups}, 2], got {tuple(lengths.shape)}")
    if lengths.device != x.device:
        raise ValueError(f"lengths are on {lengths.device}, the costs on {x.device}")
    lengths = _pairs(lengths)
    if _can_look(lengths) and ((lengths < 1) | (lengths > torch.tensor([n, m]))).any():
        raise ValueError(f"lengths must lie in [1, {n}] and [1, {m}]")
    return lengths


def _check_masses(
    x: Tensor,
    sizes: tuple[int, int],
    marginals: tuple[Tensor | None, Tensor | None],
    lengths: Tensor | None,
    is_balanced: bool,
) -> None:
    totals = []
    for side, (name, each, count) in enumerate(zip("ab", marginals, sizes, strict=True)):
        if each is None:
            each = torch.ones(1, count, dtype=torch.float64)
        each = each.detach()
        if not float(each.amin()) >= 0:
            raise ValueError(f"{name} must not be negative or NaN")
        if lengths is not None:
            there = torch.arange(count) < lengths[:, side, None]
            each = torch.where(there, each, 0)
        total = each.sum(-1, dtype=torch.float64).expand(x.shape[0])
        if not bool((total > 0).all()):
            group = int((~(total > 0)).nonzero()[0])
            raise ValueError(f"{name} of problem {group} has no mass")
        totals.append(total)
    off = (totals[0] - totals[1]).abs() > _SLACK * totals[0]
    if is_balanced and bool(off.any()):
        group = int(off.nonzero()[0])
        first, second = (float(total[group]) for total in totals)
        raise ValueError(
            f"the marginals of problem {group} have the masses {first:.6g} and {second:.6g}: they "
            "must agree, unless rho lets them give way"
        )


def _check_range(cost: Tensor, epsilon: Number) -> None:
    if not _can_look(cost) or cost.numel() == 0:
        return
    most = float(cost.detach().amax()) / float(epsilon)
    if most > _KERNEL_RANGE:
        raise ValueError(
            f'domain="kernel" needs costs / epsilon of at most {_KERNEL_RANGE:g}, got '
            f'{most:.4g}: "log" or "auto" has no such limit'
        )


# ---- the op


def _solve(
    cost: Tensor, other: Tensor | None, ground: int, call: _Call, want_plan: bool
) -> Transport:
    if not has_kernel(cost):
        divergence_autograd.warn_without_kernel(cost, "transport")
        return Transport(*reference(cost, other, ground, call, want_plan))
    inputs = (cost, other, call.a, call.b)
    learning = torch.is_grad_enabled() and (
        cost.requires_grad or any(x is not None and x.requires_grad for x in inputs)
    )
    if learning:
        value, plan, *rest = Solved.apply(call, ground, want_plan, *inputs)
    else:
        words = call.iterations, ground, call.domain, call.value, _NO_GRADIENT
        value, plan, *rest, _ = divergence_autograd.kernels().sinkhorn(
            *inputs, call.lengths, call.numbers, *words, want_plan
        )
    # The kernel has looked at the costs; an accelerator is not waited for, its value is NaN.
    if ground == 0 and _can_look(cost) and -1 in (used := rest[2].tolist()):
        group = used.index(-1)
        raise ValueError(f"costs must not be negative or NaN, those of problem {group} are")
    return Transport(value, plan if want_plan else None, *rest)
