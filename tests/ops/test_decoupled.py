"""DKD: its two parts by hand, by their definition in float64, and their gradient."""

import pytest
import torch
import torch.nn.functional as F

from stillhouse import ops

P, Q = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.5, 0.25]).log()


def dkd(student, teacher, labels, alpha, beta):
    """As the paper writes it: probabilities of two classes, and a softmax of the others."""
    q, p = student.softmax(-1), teacher.softmax(-1)
    values = []
    for row, y in enumerate(labels.tolist()):
        others = [j for j in range(q.shape[-1]) if j != y]
        q2 = torch.stack([q[row, y], q[row, others].sum()])
        p2 = torch.stack([p[row, y], p[row, others].sum()])
        hat_q, hat_p = student[row, others].softmax(-1), teacher[row, others].softmax(-1)
        target = (p2 * (p2.log() - q2.log())).sum()
        values.append(alpha * target + beta * (hat_p * (hat_p.log() - hat_q.log())).sum())
    return torch.stack(values)


@pytest.mark.parametrize(
    ("kind", "value"),
    [(ops.DKD(1, 0), 0.143841), (ops.DKD(0, 1), 0.058892), (ops.DKD(1, 0.5), 0.173287)],
    ids=repr,
)
def test_by_hand(kind, value):
    assert ops.divergence(Q, P, kind, labels=torch.tensor(0)).item() == pytest.approx(
        value, abs=1e-6
    )


@pytest.mark.parametrize("width", [2, 17, 100, 2311])
def test_by_its_definition(width, level):
    z = torch.randn(4, width, dtype=torch.float64).requires_grad_()
    t = torch.randn(4, width, dtype=torch.float64)
    labels = torch.tensor([0, 1, width - 1, width // 2])
    kind = ops.DKD(0.7, 3.0)
    expected = dkd(z / 1.5, t / 1.5, labels, 0.7, 3.0)
    value = ops.divergence(z, t, kind, labels=labels, temperature=1.5)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)
    upstream = torch.rand(4, dtype=torch.float64)
    (want,) = torch.autograd.grad(expected, z, upstream)
    (got,) = torch.autograd.grad(value, z, upstream)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_forward_kl_in_two_parts():
    """KL = TCKD + (1 - p_y) NCKD, the identity that the method starts from."""
    z, t = torch.randn(1, 50, dtype=torch.float64), torch.randn(1, 50, dtype=torch.float64)
    y = torch.tensor([7])
    beta = 1 - t.softmax(-1)[0, 7].item()
    torch.testing.assert_close(
        ops.divergence(z, t, ops.DKD(1.0, beta), labels=y), ops.divergence(z, t)
    )


def test_a_label_that_has_nearly_all_the_mass(level):
    """1 - q_y = 2e-11: the rest keeps its digits, which a subtraction would lose."""
    z, t = torch.randn(2, 500), torch.randn(2, 500)
    z[:, 3], t[:, 3] = 30, 29
    labels = torch.tensor([3, 3])
    exact = z.double().requires_grad_()
    expected = dkd(exact, t.double(), labels, 1.0, 8.0)
    (want,) = torch.autograd.grad(expected.sum(), exact)
    z.requires_grad_()
    value = ops.divergence(z, t, "dkd", labels=labels)
    (got,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-6 * want.abs().max().item())


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_with_a_label_term(softcap, level):
    """The label serves both; its column is in the label's own softmax."""
    leaf = (torch.randn(4, 2311) * 2).requires_grad_()
    t = torch.randn(4, 2311) * 2
    labels = torch.tensor([1, 2310, -100, 700])
    exact = leaf.detach().double().requires_grad_()
    teacher = t.double() if softcap is None else softcap * torch.tanh(t.double() / softcap)
    rows = [0, 1, 3]
    for temperature in (1.0, 2.0):
        capped = exact if softcap is None else softcap * torch.tanh(exact / softcap)
        each = dkd(capped[rows] / temperature, teacher[rows] / temperature, labels[rows], 1.0, 8.0)
        expected = 0.6 * each.mean() + 0.4 * F.cross_entropy(capped, labels)
        (want,) = torch.autograd.grad(expected, exact)
        for inplace in (False, True):
            loss = ops.divergence_loss(
                leaf * 1,
                t,
                "dkd",
                temperature=temperature,
                labels=labels,
                label_weight=0.4,
                logit_softcap=softcap,
                inplace_grad=inplace,
            )
            (got,) = torch.autograd.grad(loss, leaf)
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
            assert (got.double() - want).abs().max() < 3e-6 * want.abs().max()
            assert got[2].eq(0).all()


def test_a_row_without_a_rest_is_nan():
    t = torch.full((1, 5), -torch.inf)
    t[0, 2] = 0.0
    assert ops.divergence(torch.randn(1, 5), t, "dkd", labels=torch.tensor([2])).isnan().all()
