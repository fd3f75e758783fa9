"""Entropic transport in plain torch: the oracle of the tests, and what runs on a device without a
kernel. Potentials in the logarithmic domain throughout; gradients are autograd's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .sinkhorn_autograd import GRADIENTS, GROUNDS, VALUES, wide_type

_TEST_EVERY = 5


def reference(cost: Tensor, other: Tensor | None, ground: int, call: Any, want_plan: bool):
    """The fields of a `Transport`."""
    wide = wide_type(cost)
    cost = distances(cost.to(wide), None if other is None else other.to(wide), GROUNDS[ground])
    numbers = call.numbers.to(cost)
    epsilon, rhos, annealing, tolerance = numbers[0], numbers[1:3], numbers[3], numbers[4]
    groups, n, m = cost.shape
    log_a, log_b = (
        cost.new_zeros(groups, count) if each is None else each.log()
        for each, count in ((call.a, n), (call.b, m))
    )
    if call.lengths is not None:
        rows, columns = (
            torch.arange(count, device=cost.device) < call.lengths[:, side, None]
            for side, count in enumerate((n, m))
        )
        log_a = torch.where(rows, log_a, -torch.inf)
        log_b = torch.where(columns, log_b, -torch.inf)
        cost = torch.where(rows[:, :, None] & columns[:, None], cost, 0)
    start = torch.where(cost < torch.inf, cost, 0).amax((1, 2)).detach()

    def at(iteration: int) -> Tensor:  # [G, 1]
        now = torch.maximum(start * annealing**iteration, epsilon)
        return torch.where(annealing > 0, now, epsilon)[:, None]

    f, g = cost.new_zeros(groups, n), cost.new_zeros(groups, m)
    if call.lengths is not None:
        g = torch.where(log_b > -torch.inf, g, torch.where(columns, 0.0, -torch.inf))
    done = torch.zeros(groups, dtype=torch.bool, device=cost.device)
    used = torch.full((groups,), call.iterations, device=cost.device)
    for iteration in range(1, call.iterations + 1):
        eps = at(iteration)
        before = iteration - 1
        if before and before % _TEST_EVERY == 0 and bool(tolerance >= 0):
            same = (at(before) == eps)[:, 0]
            close = _error(cost, f, g, eps, log_a, rhos[0]) <= tolerance
            used = torch.where(~done & same & close, before, used)
            done = done | (same & close)
            if bool(done.all()):
                break
        new_f = _relaxed(rhos[0], eps) * eps * (log_a - _row_sums(cost, g, eps))
        new_g = _relaxed(rhos[1], eps) * eps * (log_b - _row_sums(cost.mT, new_f, eps))
        f = torch.where(done[:, None], f, new_f)
        g = torch.where(done[:, None], g, new_g)
    last = torch.stack([at(int(k))[i, 0] for i, k in enumerate(used)])[:, None] if groups else eps
    if GRADIENTS[call.gradient] == "envelope":
        f, g = f.detach(), g.detach()
    if GRADIENTS[call.gradient] == "implicit":
        f, g = _fixed_point(cost, f.detach(), g.detach(), last, log_a, log_b, rhos)
    plan = _plan(cost, f, g, last)
    value = _value(cost, plan, f, g, last, (log_a, log_b), rhos, VALUES[call.value])
    if GRADIENTS[call.gradient] == "envelope":
        # The plan is what the value's minimum does not depend on; what is left is its own cost.
        constant = plan.detach()
        free = torch.where(constant > 0, constant * cost, 0).sum((1, 2))
        sides = zip(rhos, (f, g), (constant.sum(2), constant.sum(1)), (log_a, log_b), strict=True)
        for rho, potential, sums, log_mass in sides:
            mass = log_mass.exp()
            price = rho * (1 - sums / mass.detach()) if bool(rho < torch.inf) else potential
            free = free + torch.where(mass > 0, price.detach() * mass, 0).sum(-1)
        value = value.detach() + free - free.detach()
    error = _error(cost, f, g, last, log_a, rhos[0]).detach()
    if call.lengths is not None:
        f, g = torch.where(rows, f, 0), torch.where(columns, g, 0)
    shown = plan.detach() if want_plan else None
    return value, shown, f.detach(), g.detach(), used, error


def distances(x: Tensor, y: Tensor | None, ground: str) -> Tensor:
    """Costs [G, n, m]; by the tensor of all differences."""
    if y is None:
        return x
    difference = x[:, :, None] - y[:, None]
    if ground == "l1":
        return difference.abs().sum(-1)
    squared = difference.square().sum(-1)
    if ground == "sqeuclidean":
        return squared
    return torch.where(squared > 0, torch.where(squared > 0, squared, 1).sqrt(), 0)


def _relaxed(rho: Tensor, epsilon: Tensor) -> Tensor:
    return torch.where(rho < torch.inf, rho / (rho + epsilon), 1)


def _row_sums(cost: Tensor, g: Tensor, epsilon: Tensor) -> Tensor:
    """log sum_j e^((g_j - C_ij) / epsilon)."""
    return ((g[:, None] - cost) / epsilon[:, None]).logsumexp(-1)


def _plan(cost: Tensor, f: Tensor, g: Tensor, epsilon: Tensor) -> Tensor:
    return ((f[:, :, None] + g[:, None] - cost) / epsilon[:, None]).exp()


def _error(
    cost: Tensor, f: Tensor, g: Tensor, epsilon: Tensor, log_a: Tensor, rho: Tensor
) -> Tensor:
    # The rows that the iterations leave alone: a e^(-f / rho).
    there = log_a > -torch.inf
    expected = (log_a - torch.where(there, f, 0) / rho).exp()
    rows = torch.where(there, _plan(cost, f, g, epsilon).sum(-1), 0)
    return (rows - expected).abs().amax(-1)


def _value(cost, plan, f, g, epsilon, marginals, rhos, kind: str) -> Tensor:
    # An infinite cost has no mass, and no part in the sums.
    value = torch.where(plan > 0, plan * torch.where(plan > 0, cost, 0), 0).sum((1, 2))
    if kind == "transport":
        return value
    exponents = (f[:, :, None] + g[:, None] - cost) / epsilon[:, None]
    log_plan = torch.where(plan > 0, exponents, 0)
    value = value + epsilon[:, 0] * (plan * (log_plan - 1)).sum((1, 2))
    for rho, sums, log_mass in zip(rhos, (plan.sum(2), plan.sum(1)), marginals, strict=True):
        if bool(rho < torch.inf):
            there = (sums > 0) & (log_mass > -torch.inf)
            ratio = torch.where(there, sums, 1).log() - torch.where(there, log_mass, 0)
            value = value + rho * (sums * ratio - sums + log_mass.exp()).sum(-1)
    return value


def _fixed_point(cost, f, g, epsilon, log_a, log_b, rhos):
    """f and g as the functions of costs and marginals that the iterations' fixed point makes them:
    their numbers stay, their derivatives solve its linear equations."""
    weights = [_relaxed(rho, epsilon) * epsilon for rho in rhos]
    moved_f = weights[0] * (log_a - _row_sums(cost, g, epsilon))
    moved_g = weights[1] * (log_b - _row_sums(cost.mT, f, epsilon))
    present = [x > -torch.inf for x in (log_a, log_b)]
    plan = _plan(cost, f, g, epsilon).detach()
    rows, columns = plan.sum(2), plan.sum(1)
    # d f_i + relax_a sum_j (P_ij / r_i) d g_j = what moved_f says, and the other way round.
    n, m = f.shape[1], g.shape[1]
    system = torch.eye(n + m, dtype=plan.dtype, device=plan.device).repeat(len(f), 1, 1)
    share_a = _relaxed(rhos[0], epsilon) / torch.where(rows > 0, rows, 1)
    share_b = _relaxed(rhos[1], epsilon) / torch.where(columns > 0, columns, 1)
    system[:, :n, n:] = share_a[:, :, None] * plan
    system[:, n:, :n] = share_b[:, :, None] * plan.mT
    moved = torch.cat([moved_f, moved_g], -1)
    there = torch.cat(present, -1)
    moved = torch.where(there, torch.where(there, moved, 0), 0)
    change = moved - moved.detach()
    inverse = torch.linalg.pinv(system)
    change = (inverse @ change[:, :, None])[:, :, 0]
    return f + change[:, :n], g + change[:, n:]
