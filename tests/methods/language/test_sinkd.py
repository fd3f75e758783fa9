"""SinKD: exact values, what the batch-wise form does not know, and the objective."""

import pytest
import torch

from stillhouse import ops
from stillhouse.methods.language import (
    SinKDLoss,
    embedded_sinkhorn_kd,
    sample_sinkhorn_kd,
    sinkhorn_kd,
)
from stillhouse.train import LogitRows, supervised_rows

DOUBLE = torch.float64


def pair(*shape):
    return torch.randn(2, *shape, dtype=DOUBLE).unbind(0)


def official(student, teacher, temperature=2.0, epsilon=0.1, iterations=20):
    """Rows and then columns of K, through autograd."""
    s, u = ((x / temperature).softmax(-1) for x in (student, teacher))
    cost = (s[:, None] - u[None]).abs().sum(-1)
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


def test_it_is_the_official_form_in_value_and_gradient():
    student, teacher = pair(16, 7)
    given, again = (student.clone().requires_grad_() for _ in range(2))
    found, want = sinkhorn_kd(given, teacher), official(again, teacher)
    found.backward()
    want.backward()
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(given.grad, again.grad, rtol=1e-9, atol=1e-12)
    mass = sinkhorn_kd(student, teacher, normalize="mass")
    torch.testing.assert_close(mass, want.detach() / 16)


def test_it_does_not_know_whose_row_is_whose():
    student, teacher = pair(8, 5)
    moved = sinkhorn_kd(student, teacher[torch.randperm(8)])
    torch.testing.assert_close(moved, sinkhorn_kd(student, teacher))


def test_equal_sides_have_a_bias_that_can_be_taken_out():
    student, teacher = pair(8, 10)
    given = student.clone().requires_grad_()
    assert float(sinkhorn_kd(student, student)) > 0.01
    same = sinkhorn_kd(given, student, debias=True)
    assert abs(float(same.detach())) < 1e-12
    other = sinkhorn_kd(student, teacher, debias=True)
    parts = [sinkhorn_kd(*x) for x in ((student, teacher), (student,) * 2, (teacher,) * 2)]
    torch.testing.assert_close(other, parts[0] - (parts[1] + parts[2]) / 2)


def test_groups_and_costs_of_ones_own():
    student, teacher = pair(3, 6, 9)
    each = torch.stack([sinkhorn_kd(s, t) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(sinkhorn_kd(student, teacher), each.mean())
    l2 = sinkhorn_kd(student, teacher, cost="l2")
    torch.testing.assert_close(l2, sinkhorn_kd(student, teacher, cost=torch.cdist))
    one = sinkhorn_kd(student[0], teacher[0], cost="l2")
    torch.testing.assert_close(one, sinkhorn_kd(student[0], teacher[0], cost=torch.cdist))


def test_one_row_is_the_distance():
    student, teacher = pair(1, 6)
    with pytest.warns(UserWarning, match="its plan has no choice"):
        found = sinkhorn_kd(student, teacher)
    s, u = ((x / 2).softmax(-1) for x in (student, teacher))
    torch.testing.assert_close(found, (s - u).abs().sum())


def test_the_sample_form_goes_to_sorted_rows():
    """epsilon -> 0: the cost of the best matching of values, which is the sorted one (ULD)."""
    student, teacher = 3 * torch.randn(6, 7, dtype=DOUBLE), 3 * torch.randn(6, 5, dtype=DOUBLE)
    found = sample_sinkhorn_kd(
        student, teacher, temperature=1.0, epsilon=1e-3, iterations=20_000, gradient="implicit"
    )
    want = ops.divergence(student, teacher, "uld").mean()
    assert float(found) == pytest.approx(float(want), rel=0.02)
    one = student[:1].clone().requires_grad_()
    loss = sample_sinkhorn_kd(one, teacher[:1])
    loss.backward()
    s, u = (one.detach() / 2).softmax(-1)[0], (teacher[:1] / 2).softmax(-1)[0]
    cost = (s[:, None] - torch.nn.functional.pad(u, (0, 2))[None]).abs()
    torch.testing.assert_close(loss.detach(), ops.sinkhorn(cost[None], 0.1).value[0])
    assert one.grad.abs().sum() > 0


def test_embedded_vocabularies():
    """With the same tokens in another order nothing is left to move but the blur; what is nearer
    costs less; and the gradient is that of the costs."""
    student = 4 * torch.randn(3, 6, dtype=DOUBLE)
    tokens, order = torch.randn(6, 4, dtype=DOUBLE), torch.randperm(6)
    teacher = student[:, order]
    near, left_out = embedded_sinkhorn_kd(student, teacher, tokens, tokens[order], epsilon=0.01)
    far, _ = embedded_sinkhorn_kd(student, teacher.flip(-1), tokens, tokens[order], epsilon=0.01)
    assert 0 <= float(near) < 0.02 < float(far)
    assert float(left_out) == pytest.approx(0, abs=1e-12)
    _, some = embedded_sinkhorn_kd(student, teacher, tokens, tokens[order], top=2)
    assert float(some) > 0
    options = dict(epsilon=0.1, iterations=2000)

    def loss(x):
        return embedded_sinkhorn_kd(x, teacher.flip(-1), tokens, tokens, **options)[0]

    assert torch.autograd.gradcheck(loss, student.requires_grad_(), atol=1e-6)
    with pytest.raises(ValueError, match=r"embeddings must be \[6, d\]"):
        embedded_sinkhorn_kd(student.detach(), teacher, tokens[:5], tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(teacher_logits=torch.zeros(3, 5)), "the same rows and classes"),
        (dict(teacher_logits=torch.zeros(4, 6)), "the same rows and classes"),
        (dict(teacher_logits=torch.zeros(4, 5, requires_grad=True)), "detach its logits"),
        (dict(normalize="rows"), "normalize must be None or 'mass'"),
        (dict(cost="l3"), "cost must be 'l1', 'l2' or a function"),
        (dict(epsilon=0.0), "epsilon must be a positive number"),
    ],
)
def test_bad_input(changes, message):
    options = dict(student_logits=torch.zeros(4, 5), teacher_logits=torch.zeros(4, 5)) | changes
    with pytest.raises(ValueError, match=message):
        sinkhorn_kd(**options)


# ---- the objective


def rows(batch=3, length=30, columns=50):
    index = supervised_rows(torch.randint(0, columns, (batch, length)))
    count = index.row.numel()
    return torch.randn(count, columns), torch.randn(count, columns), index


def test_the_objective_is_the_sum_of_its_terms():
    """Columns that are all kept: the soft cross-entropy, the labels and the term of each group."""
    student, teacher, index = rows()
    given = student.clone().requires_grad_()
    objective = SinKDLoss(alpha=0.7, beta=50.0, kd_temperature=3.0, rows=96, group=32, top=50)
    parts = objective(LogitRows(given * 1, index), LogitRows(teacher, index), {})
    again = student.clone().requires_grad_()
    soft = ops.divergence_loss(again, teacher, "soft_cross_entropy", temperature=3.0)
    hard = torch.nn.functional.cross_entropy(again, index.target)
    groups = [x[:64].view(2, 32, -1) for x in (again, teacher)]
    term = sinkhorn_kd(*groups)
    want = 0.7 * soft + 0.3 * hard + 0.05 * term
    torch.testing.assert_close(parts["loss"], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts["sinkhorn"], term.detach(), rtol=1e-4, atol=1e-5)
    assert float(parts["dropped"]) == pytest.approx(0, abs=1e-5)
    parts["loss"].backward()
    want.backward()
    torch.testing.assert_close(given.grad, again.grad, rtol=1e-3, atol=1e-6)
    assert {"acceptance", "agreement"} <= parts.keys()


def test_columns_that_are_left_out_are_said():
    student, teacher, index = rows()
    parts = SinKDLoss(top=1)(LogitRows(student, index), LogitRows(teacher, index), {})
    p = (teacher / 2).softmax(-1)
    ids = p.argmax(-1).unique()
    torch.testing.assert_close(parts["dropped"], 1 - p[:, ids].sum(-1).mean())


def test_a_teacher_of_some_columns_is_refused():
    student, teacher, index = rows()
    sparse = ops.SparseTeacher.from_logits(teacher, k=4)
    with pytest.raises(ValueError, match="it needs a teacher's logits, got SparseTeacher"):
        SinKDLoss()(LogitRows(student, index), sparse, {})


def test_few_rows_have_no_such_term():
    student, teacher, index = rows(batch=1, length=5)
    given = student.clone().requires_grad_()
    parts = SinKDLoss()(LogitRows(given * 1, index), LogitRows(teacher, index), {})
    parts["loss"].backward()
    assert float(parts["sinkhorn"]) == 0
    assert given.grad.isfinite().all()


def test_the_temperature_is_annealed_and_kept():
    objective = SinKDLoss(kd_temperature=4.0, anneal=True)
    for step, want in ((1, 3.25), (2, 2.5), (4, 1.0)):
        objective.update({"loss": 1.0}, step, 4)
        assert objective.temperature.item() == pytest.approx(want)
    other = SinKDLoss(kd_temperature=4.0, anneal=True)
    other.load_state_dict(objective.state_dict())
    assert other.temperature.item() == 1.0
    still = SinKDLoss(kd_temperature=4.0)
    still.update({"loss": 1.0}, 4, 4)
    assert still.temperature.item() == 4.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha=1.5), r"alpha is a share in \[0, 1\]"),
        (dict(beta=-1.0), "beta must be a positive number"),
        (dict(kd_temperature=0.0), "kd_temperature must be a positive number"),
        (dict(rows=8, group=32), "expected rows >= group >= 2"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        SinKDLoss(**options)


def test_it_trains_a_language_model(assert_learns):
    """`stillhouse distill --method sinkd`."""
    assert_learns("sinkd", method_options="beta=100")
