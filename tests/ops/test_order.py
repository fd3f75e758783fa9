"""Kinds that depend on an order of columns, against sorting in float64."""

import pytest
import torch

from stillhouse import ops

LEVELS = [*range(ops.cpu_level() + 1), "simt"]


@pytest.fixture(params=LEVELS, ids=lambda n: f"level{n}")
def level(request):
    if request.param == "simt":
        request.getfixturevalue("simt")
        yield "simt"
        return
    best = ops.cpu_level()
    ops.cpu_level(request.param)
    yield request.param
    ops.cpu_level(best)


# --- the head of adaptive_kl ----------------------------------------------------------------------


def head_by_sorting(p, mu):
    """The longest prefix of the descending order (ties by column) with a sum of at most mu."""
    order = sorted(range(len(p)), key=lambda j: (-p[j], j))
    head, total = order[:1], p[order[0]]
    for j in order[1:]:
        total += p[j]
        if total > mu:
            break
        head.append(j)
    return head


def adaptive_weight(z, t, mu):
    """Of the reverse KL, one a row."""
    weights = []
    for q, p in zip(z.double().softmax(-1), t.double().softmax(-1), strict=True):
        gap = (p - q).abs()
        in_head = gap[head_by_sorting(p.tolist(), mu)].sum()
        weights.append(1 - in_head / gap.sum())
    return torch.stack(weights)


def check_adaptive(z, t, mu, rtol=1e-9):
    """Value and gradient are those of the two KLs at the row's weight, which is a constant."""
    weight = adaptive_weight(z, t, mu)
    z = z.requires_grad_()
    parts = [ops.divergence(z, t, name) for name in ("forward_kl", "reverse_kl")]
    expected = (1 - weight).to(z.dtype) * parts[0] + weight.to(z.dtype) * parts[1]
    value = ops.divergence(z, t, ops.AdaptiveKL(mu))
    torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-12)
    (want,) = torch.autograd.grad(expected.sum(), z)
    (got,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * want.abs().max().item())


@pytest.mark.parametrize("mu", [0.02, 0.5, 0.97])
@pytest.mark.parametrize("width", [3, 49, 1000, 5003])
def test_adaptive_weights(width, mu, level):
    for scale in (0.3, 3.0):
        check_adaptive(
            torch.randn(4, width, dtype=torch.float64) * scale,
            torch.randn(4, width, dtype=torch.float64) * scale,
            mu,
        )


@pytest.mark.parametrize("values", [1, 2, 5, 40])
def test_ties_go_to_the_lower_column(values, level):
    """A teacher of few distinct logits, of one at the limit: the border falls among equal ones."""
    for width in (50, 2311):
        t = torch.randint(0, values, (4, width)).double() / 8
        z = torch.randn(4, width, dtype=torch.float64)
        for mu in (0.203, 0.711):
            check_adaptive(z.clone(), t, mu)


def test_ties_of_bfloat16(level):
    z, t = torch.randn(4, 3001).bfloat16(), torch.randn(4, 3001).bfloat16()
    check_adaptive(z.float(), t.float(), 0.4, rtol=1e-5)
    as_they_are = ops.divergence(z, t, ops.AdaptiveKL(0.4))
    torch.testing.assert_close(
        as_they_are, ops.divergence(z.float(), t.float(), ops.AdaptiveKL(0.4)), rtol=1e-5, atol=0
    )


def test_a_teacher_of_some_columns(level):
    """-inf columns: the border may lie below all that is left."""
    z, t = torch.randn(3, 700, dtype=torch.float64), torch.randn(3, 700, dtype=torch.float64)
    hidden = torch.rand(700) < 0.98
    z[:, hidden], t[:, hidden] = -torch.inf, -torch.inf
    check_adaptive(z, t, 0.9)
