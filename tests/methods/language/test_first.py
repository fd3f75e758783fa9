"""FIRST: re-calibration by hand, the search for c, the loss and its gradient, and what goes wrong
where the authors' code differs."""

import pytest
import torch

from stillhouse import ops
from stillhouse.methods.language import FIRSTLoss, fit_temperature, recalibrate
from stillhouse.train import LogitRows, RowIndex, ece

DOUBLE = torch.float64
TOP = torch.tensor([0.9, 0.05, 0.02, 0.02, 0.01], dtype=DOUBLE)
BY_HAND = {
    0.1: (0.9994, 2e-4, 2e-4, 2e-4, 1e-4),
    0.3: (0.8219, 0.0483, 0.0437, 0.0437, 0.0423),
    0.5: (0.5898, 0.1078, 0.1015, 0.1015, 0.0995),
    1.0: (0.3749, 0.1602, 0.1555, 0.1555, 0.1539),
}


def sparse(probabilities, ids=None, columns=30, tail="renormalize", **options):
    log_probs = torch.as_tensor(probabilities, dtype=DOUBLE).log()
    if ids is None:
        ids = torch.arange(log_probs.shape[-1]).expand(log_probs.shape)
    return ops.SparseTeacher(ids, log_probs, columns, tail=tail, **options)


def rows(student, targets=None):
    here = torch.arange(len(student))
    return LogitRows(student, RowIndex(here, here * 0 if targets is None else targets, here))


def some(n=6, columns=30, k=5, tail="renormalize"):
    student, teacher = 2 * torch.randn(2, n, columns, dtype=DOUBLE)
    return student, teacher, ops.SparseTeacher.from_logits(teacher, k=k, tail=tail)


# Re-calibration -----------------------------------------------------------------------------------


@pytest.mark.parametrize("c", BY_HAND)
def test_five_probabilities_by_hand(c):
    found = recalibrate(sparse(TOP[None]), c).log_probs.exp()[0]
    torch.testing.assert_close(found, torch.tensor(BY_HAND[c], dtype=DOUBLE), atol=5e-5, rtol=0)
    torch.testing.assert_close(found, torch.softmax(TOP / c, -1))


def test_large_c_makes_even_and_small_c_certain():
    teacher = sparse(TOP[None])
    assert recalibrate(teacher, 1e6).log_probs.exp()[0].tolist() == pytest.approx([0.2] * 5)
    assert recalibrate(teacher, 1e-3).log_probs[0, 0].exp() == 1


def test_in_the_space_of_logits_it_is_a_temperature():
    logits = torch.randn(4, 9, dtype=DOUBLE)
    whole = ops.SparseTeacher.from_logits(logits, k=9, tail="renormalize")
    found = recalibrate(whole, 2.5, space="logit").to_dense()
    torch.testing.assert_close(found, torch.log_softmax(logits / 2.5, -1))
    with pytest.raises(ValueError, match="space must be 'prob' or 'logit', got 'log'"):
        recalibrate(whole, 2.5, space="log")


@pytest.mark.parametrize("space", ["prob", "logit"])
def test_a_bucket_is_one_more_of_them(space):
    p = torch.tensor([[0.6, 0.2, 0.1]], dtype=DOUBLE)
    found = recalibrate(sparse(p, tail="bucket"), 0.5, space=space)
    all_four = torch.tensor([[0.6, 0.2, 0.1, 0.1]], dtype=DOUBLE)
    want = torch.softmax((all_four if space == "prob" else all_four.log()) / 0.5, -1)
    torch.testing.assert_close(found.log_probs.exp(), want[:, :3])
    torch.testing.assert_close(found.log_rest.exp(), want[:, 3])
    assert found.tail == "bucket"
    # The mass that is known counts, not what rounding leaves of 1.
    known = sparse(p, tail="bucket", log_rest=torch.tensor([0.05], dtype=DOUBLE).log())
    other = recalibrate(known, 0.5, space=space).log_rest.exp()
    all_four[:, 3] = 0.05
    want = torch.softmax((all_four if space == "prob" else all_four.log()) / 0.5, -1)
    torch.testing.assert_close(other, want[:, 3])


def test_places_without_a_column_stay_without_mass():
    teacher = sparse([[0.7, 0.2, 1.0]], ids=torch.tensor([[4, 9, -1]]))
    found = recalibrate(teacher, 0.5).log_probs.exp()
    want = torch.softmax(torch.tensor([0.7, 0.2], dtype=DOUBLE) / 0.5, -1)
    torch.testing.assert_close(found[0, :2], want)
    assert found[0, 2] == 0


@pytest.mark.parametrize(
    ("changes", "c", "message"),
    [
        ({}, 0.0, "c must be a positive number, got 0.0"),
        ({}, -1.0, "c must be a positive number"),
        ({}, float("nan"), "c must be a positive number"),
        ({"tail": "uniform"}, 0.5, "tail must be renormalize or bucket, got 'uniform'"),
        ({"temperature": 2.0}, 0.5, "probabilities at temperature 2"),
    ],
)
def test_recalibrate_refuses(changes, c, message):
    with pytest.raises(ValueError, match=message):
        recalibrate(sparse(TOP[None], **changes), c)


@pytest.mark.parametrize(
    ("p", "ids", "message"),
    [
        ([[0.9, 0.2]], None, "add up to 1.1"),
        ([[2.0, 0.1]], None, "add up to 2.1"),
        ([[0.5, 0.1]], [[3, 3]], "id 3 comes twice in row 0"),
        ([[0.5, 0.1]], [[3, 30]], r"id 30 of row 0 is outside \[0, 30\)"),
        ([[0.5, -0.1]], None, "is a probability negative"),
    ],
)
def test_probabilities_that_cannot_be(p, ids, message):
    with pytest.raises(ValueError, match=message):
        recalibrate(sparse(p, None if ids is None else torch.tensor(ids)), 0.5)


# The search ---------------------------------------------------------------------------------------


def test_c_is_found_on_both_grids():
    """Every row says .9 and softmax(P / c) says what it said at c = .46: right as often as that."""
    n = 4000
    wanted = torch.softmax(TOP / 0.46, -1)[0].item()
    labels = torch.where(torch.arange(n) < round(wanted * n), 0, 1)
    c, curve = fit_temperature(sparse(TOP.expand(n, 5)), labels)
    assert c == pytest.approx(0.46)
    first = [round(0.1 * i, 10) for i in range(1, 11)]
    around = [round(0.5 + 0.02 * i, 10) for i in range(-5, 6)]
    assert list(curve) == sorted({*first, *around})
    for each in (0.2, 0.46, 1.0):
        says = torch.softmax(TOP / each, -1)[0].item()
        assert curve[each] == pytest.approx(abs(round(wanted * n) / n - says), abs=1e-9)


def test_the_search_goes_beyond_one():
    """Right less often than softmax(P / c) says at any c that is tried: the largest is taken."""
    c, curve = fit_temperature(sparse(TOP.expand(10, 5)), torch.tensor([0, 0, 0, *[1] * 7]))
    assert c == max(curve) == 1.1


def test_the_metric_sees_each_rows_confidence_and_luck():
    _, _, teacher = some(n=50)
    labels = teacher.ids[:, 0].long().clone()
    labels[:10] = teacher.ids[:10, 1].long()
    labels[40:] = -100
    seen = []

    def brier(confidence, correct):
        seen.append((confidence, correct))
        return ((confidence - correct.double()) ** 2).mean()

    c, curve = fit_temperature(teacher, labels, metric=brier, coarse=0.5, fine=0.25)
    assert len(curve) == len(seen)
    assert c == 0.25
    assert curve[c] == min(curve.values()) < curve[0.5]
    torch.testing.assert_close(seen[0][0], recalibrate(teacher, 0.5).log_probs.exp()[:40, 0])
    assert seen[0][1].tolist() == [False] * 10 + [True] * 30


def test_where_stored_columns_are_in_any_order_the_largest_is_predicted():
    p, order = TOP.expand(20, 5), torch.tensor([3, 0, 4, 1, 2])
    labels = torch.zeros(20, dtype=torch.int64)
    moved = sparse(p[:, order], ids=order.expand(20, 5))
    (c, curve), (again, other) = (fit_temperature(t, labels) for t in (moved, sparse(p)))
    assert c == again
    assert curve == pytest.approx(other, abs=1e-12)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1], {}, r"a label a row, \(3,\), got \(2,\)"),
        ([-100] * 3, {}, "no label counts"),
        ([0, 30, 1], {}, "label 30 is outside the vocabulary of 30"),
        ([0, -1, 1], {}, "label -1 is outside"),
        ([0, 1, 1], {"coarse": 0.0}, r"must lie in \(0, 1\], got 0.0 and 0.02"),
        ([0, 1, 1], {"metric": "brier"}, "metric must be 'ece' or a function"),
    ],
)
def test_fit_refuses(labels, options, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(sparse(TOP.expand(3, 5)), torch.tensor(labels), **options)


def test_an_empty_validation_set_is_one_line():
    with pytest.raises(ValueError, match="no label counts"):
        fit_temperature(sparse(TOP.expand(0, 5)), torch.zeros(0, dtype=torch.int64))


# The loss -----------------------------------------------------------------------------------------


def test_value_and_gradient_are_those_of_the_closed_form():
    student, _, teacher = some()
    given = student.clone().requires_grad_()
    loss = FIRSTLoss(0.4)(rows(given * 1), teacher, {})["loss"]
    loss.backward()
    p = torch.softmax(teacher.log_probs.exp() / 0.4, -1)
    target = torch.zeros_like(student).scatter(1, teacher.ids.long(), p)
    log_q = student.log_softmax(-1)
    want = (torch.xlogy(target, target) - target * log_q).sum(-1).mean()
    torch.testing.assert_close(loss.detach(), want)
    torch.testing.assert_close(given.grad, (log_q.exp() - target) / len(student))


def test_all_columns_as_they_are_is_forward_kl():
    student, logits, _ = some()
    loss = FIRSTLoss(None, k=30)(rows(student), rows(logits), {})["loss"]
    torch.testing.assert_close(loss, ops.divergence(student, logits, "forward_kl").mean())


def test_a_bucket_compares_the_others_mass_as_one():
    """Against five terms and the sixth written out, and its gradient by central differences."""
    student, _, teacher = some(tail="bucket")
    loss = FIRSTLoss(0.4, tail="bucket")
    target = recalibrate(teacher, 0.4)
    p = torch.cat([target.log_probs, target.log_rest[:, None]], -1).exp()
    q = student.softmax(-1).gather(1, teacher.ids.long())
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    found = loss(rows(student), teacher, {})["loss"]
    torch.testing.assert_close(found, (p * (p / q).log()).sum(-1).mean())

    def value(z):
        return loss(rows(z), teacher, {})["loss"]

    given = student.clone().requires_grad_()
    value(given * 1).backward()
    for row, column in ((0, int(teacher.ids[0, 2])), (3, int(student[3].argmin())), (5, 17)):
        step = torch.zeros_like(student)
        step[row, column] = 1e-5
        slope = (value(student + step) - value(student - step)) / 2e-5
        torch.testing.assert_close(given.grad[row, column], slope, rtol=1e-6, atol=1e-10)


def test_the_order_of_the_five_does_not_matter():
    student, _, teacher = some()
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = ops.SparseTeacher(
        teacher.ids[:, order], teacher.log_probs[:, order], 30, tail="renormalize"
    )
    loss = FIRSTLoss(0.4)
    torch.testing.assert_close(
        loss(rows(student), moved, {})["loss"], loss(rows(student), teacher, {})["loss"]
    )


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_a_model_and_what_was_stored_of_it_teach_the_same(tail):
    student, logits, _ = some()
    loss = FIRSTLoss(0.4, tail=tail)
    want = loss(rows(student), ops.SparseTeacher.from_logits(logits, k=5, tail=tail), {})["loss"]
    more = ops.SparseTeacher.from_logits(logits, k=12, tail=tail)
    torch.testing.assert_close(loss(rows(student), more, {})["loss"], want)
    torch.testing.assert_close(loss(rows(student), rows(logits), {})["loss"], want)
    padded = torch.cat([logits, logits.new_full((6, 2), 50.0)], -1)
    wide = torch.cat([student, student.new_full((6, 2), 50.0)], -1)
    parts = loss(rows(wide), rows(padded), {"vocab_size": 30})
    torch.testing.assert_close(parts["loss"], want)


def test_rows_of_other_tokens_are_not_compared():
    student, logits, _ = some()
    with pytest.raises(ValueError, match="supervised row 0 predicts token 1"):
        FIRSTLoss(0.4)(rows(student, torch.ones(6).long()), rows(logits), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"c": 0.0}, "c must be a positive number or None"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"tail": "drop"}, "tail must be renormalize or bucket, got 'drop'"),
        ({"space": "log"}, "space must be"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        FIRSTLoss(**({"c": 0.5} | options))


def test_teachers_that_do_not_fit():
    student, logits, teacher = some()
    with pytest.raises(ValueError, match="at least 6 columns .* got 5 with 'renormalize'"):
        FIRSTLoss(0.4, k=6)(rows(student), teacher, {})
    with pytest.raises(ValueError, match="tail 'bucket', got 5 with 'renormalize'"):
        FIRSTLoss(0.4, tail="bucket")(rows(student), teacher, {})
    with pytest.raises(ValueError, match=r"k must lie in \[1, 30\], got 31"):
        FIRSTLoss(0.4, k=31)(rows(student), rows(logits), {})


# What goes wrong otherwise ------------------------------------------------------------------------


def certain_teacher(n=120, columns=48, right=0.55):
    """Rows that say about .95 to a token that is right 55 times in a hundred."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(columns, (n,), generator=generator)
    wrong = torch.arange(n) >= right * n
    says = torch.where(wrong, (labels + 1) % columns, labels)
    logits = torch.randn(n, columns, generator=generator, dtype=DOUBLE)
    return logits.scatter(1, says[:, None], 7.0), labels


def learned(loss, shape, steps=200):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(logits).backward()
        optimizer.step()
    return logits.detach()


def quality(logits, labels):
    confidence, predicted = logits.softmax(-1).max(-1)
    return ece(confidence, predicted == labels), (predicted == labels).double().mean().item()


def test_the_same_c_on_both_sides_teaches_the_overconfidence():
    logits, labels = certain_teacher()
    teacher = ops.SparseTeacher.from_logits(logits, k=5, tail="renormalize")
    c, _ = fit_temperature(teacher, labels)
    target = torch.softmax(teacher.log_probs.exp() / c, -1)

    def both_sides(z):
        q = z.softmax(-1).gather(1, teacher.ids.long())
        return -(target * torch.log_softmax(q / c, -1)).sum(-1).mean()

    ours = learned(lambda z: FIRSTLoss(c)(rows(z * 1), teacher, {})["loss"], logits.shape)
    theirs = learned(both_sides, logits.shape)
    assert quality(ours, labels)[0] < 0.02
    assert quality(theirs, labels)[0] > 0.3


def test_comparing_among_the_five_alone_leaves_the_rest_free():
    logits, labels = certain_teacher()
    teacher = ops.SparseTeacher.from_logits(logits, k=2, tail="renormalize")
    ours = learned(lambda z: FIRSTLoss(0.6, k=2)(rows(z * 1), teacher, {})["loss"], logits.shape)
    alone = learned(lambda z: ops.divergence_loss(z, teacher, "support_kl"), logits.shape)
    assert quality(ours, labels)[1] == pytest.approx(0.55, abs=0.01)
    # Of 48 columns 46 were never moved, and one of them is often the largest.
    assert quality(alone, labels)[1] < quality(ours, labels)[1] - 0.05


def test_it_trains_a_language_model(tmp_path, assert_learns, distilled):
    """`stillhouse distill --method first`, and what it says of a stored teacher's tail."""
    from stillhouse.errors import UsageError

    assert_learns("first", method_options="c=0.3")
    stored = dict(teacher=None, teacher_shards=tmp_path / "shards", overwrite="true")
    with pytest.raises(UsageError, match="it takes --teacher_tail renormalize"):
        distilled("first", method_options="c=0.3", **stored)
    with pytest.raises(UsageError, match="--method first does not take these options"):
        distilled("first", method_options="c=0.3", temperature=2.0, **stored)
