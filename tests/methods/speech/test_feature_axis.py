"""The distillation of features: closed forms, what it does not see, gradients, bad input."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity, logsigmoid

from stillhouse.methods.speech import align_text, feature_axis_distillation

DOUBLE = torch.float64


def features(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def column(*values):
    return torch.tensor(values, dtype=DOUBLE)[None, :, None]


@pytest.mark.parametrize(
    ("student", "loss"),
    [
        ((3.0, 0.0), 0.313262),  # cosine 1
        ((0.0, -2.0), 0.693147),  # 0
        ((-0.5, 0.0), 1.313262),  # -1
        ((1.0, math.sqrt(3)), 0.474077),  # 1/2
    ],
)
def test_closed_forms(student, loss):
    found = feature_axis_distillation(column(*student), column(1.0, 0.0))
    assert float(found) == pytest.approx(loss, abs=5e-7)


def test_it_is_the_mean_over_columns_of_the_paper():
    student, teacher = features(3, 7, 5), features(3, 7, 5, seed=1)
    found = feature_axis_distillation(student, teacher)
    rows = -logsigmoid(cosine_similarity(student, teacher, dim=1))
    torch.testing.assert_close(found, rows.mean())
    none = feature_axis_distillation(student, teacher, reduction="none")
    torch.testing.assert_close(none, rows)
    assert none.shape == (3, 5)


@pytest.mark.parametrize("axis", ["feature", "time"])
def test_the_longer_side_is_cropped(axis):
    student, teacher = features(2, 5, 4), features(2, 7, 4, seed=1)
    want = feature_axis_distillation(student, teacher[:, :5], axis=axis)
    torch.testing.assert_close(feature_axis_distillation(student, teacher, axis=axis), want)
    # The same the other way round.
    found = feature_axis_distillation(teacher, student, axis=axis)
    want = feature_axis_distillation(teacher[:, :5], student, axis=axis)
    torch.testing.assert_close(found, want)


def test_the_time_axis():
    student, teacher = features(2, 6, 4), features(2, 6, 4, seed=1)
    cosine = -logsigmoid(cosine_similarity(student, teacher, dim=-1)).mean()
    l1 = (student - teacher).abs().mean()
    found = feature_axis_distillation(student, teacher, axis="time")
    torch.testing.assert_close(found, l1 + cosine)
    found = feature_axis_distillation(student, teacher, axis="time", l1_weight=0.0)
    torch.testing.assert_close(found, cosine)
    found = feature_axis_distillation(student, teacher, axis="time", l1_weight=0.3)
    torch.testing.assert_close(found, 0.3 * l1 + cosine)
    none = feature_axis_distillation(student, teacher, axis="time", reduction="none")
    assert none.shape == (2, 6)
    torch.testing.assert_close(none.mean(), l1 + cosine)


def test_columns_have_no_scale_and_their_gradient_no_part_along_them():
    student, teacher = features(2, 6, 4).requires_grad_(), features(2, 6, 4, seed=1)
    scales = torch.rand(2, 1, 4, dtype=DOUBLE) + 0.1
    loss = feature_axis_distillation(student, teacher)
    torch.testing.assert_close(feature_axis_distillation(student * scales, teacher), loss)
    torch.testing.assert_close(feature_axis_distillation(student, teacher * scales), loss)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.abs().min() > 1e-6
    assert (gradient * student).sum(1).abs().max() < 1e-14


def test_it_knows_nothing_of_the_moment():
    """Frames of both sides in another order: the same; the time axis agrees as a mean."""
    student, teacher, order = features(2, 6, 4), features(2, 6, 4, seed=1), torch.randperm(6)
    loss = feature_axis_distillation(student, teacher)
    moved = feature_axis_distillation(student[:, order], teacher[:, order])
    torch.testing.assert_close(moved, loss)
    other = feature_axis_distillation(student, teacher[:, order])
    assert abs(float(other - loss)) > 1e-3


@pytest.mark.parametrize("axis", ["feature", "time"])
def test_gradients(axis):
    student, teacher = features(2, 5, 3).requires_grad_(), features(2, 7, 3, seed=1)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])

    def loss(x):
        return feature_axis_distillation(x, teacher, axis=axis, mask=mask)

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize("axis", ["feature", "time"])
def test_masked_frames_are_not_read(axis):
    student, teacher = features(3, 6, 4), features(3, 6, 4, seed=1)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False] * 6])
    each = [
        feature_axis_distillation(student[:1], teacher[:1], axis=axis),
        feature_axis_distillation(student[1:2, :4], teacher[1:2, :4], axis=axis),
    ]
    # Sequences weigh alike, frames weigh alike.
    want = (each[0] + each[1]) / 2 if axis == "feature" else (6 * each[0] + 4 * each[1]) / 10
    spoiled = [x.masked_fill(~mask[..., None], float("nan")) for x in (student, teacher)]
    spoiled[0].requires_grad_()
    found = feature_axis_distillation(*spoiled, axis=axis, mask=mask)
    torch.testing.assert_close(found.detach(), want)
    found.backward()
    assert spoiled[0].grad[~mask].abs().max() == 0
    assert spoiled[0].grad[mask].abs().min() > 0


def test_a_teacher_column_of_zeros_is_left_out():
    student, teacher = features(2, 5, 4), features(2, 5, 4, seed=1)
    teacher[0, :, 2] = 0
    with pytest.warns(UserWarning, match="1 of 8 teacher columns are 0: they are left out"):
        found = feature_axis_distillation(student, teacher)
    rows = feature_axis_distillation(student, features(2, 5, 4, seed=1), reduction="none")
    torch.testing.assert_close(found, (rows[0, [0, 1, 3]].mean() + rows[1].mean()) / 2)
    with pytest.warns(UserWarning, match="4 of 4"):
        nothing = feature_axis_distillation(student[:1], torch.zeros_like(teacher[:1]))
    assert float(nothing) == 0


def test_a_student_column_of_zeros_has_no_direction():
    """Cosine 0, and a finite gradient of none: the clamped form's is 1e8 there."""
    student, teacher = features(1, 5, 3), features(1, 5, 3, seed=1)
    student[:, :, 1] = 0
    student.requires_grad_()
    rows = feature_axis_distillation(student, teacher, reduction="none")
    assert float(rows[0, 1].detach()) == pytest.approx(math.log(2))
    rows.sum().backward()
    assert student.grad[..., 1].abs().max() == 0
    assert 0 < student.grad[..., 0].abs().max() < 10


def test_halves_are_reckoned_in_float32():
    student, teacher = features(2, 400, 4), features(2, 400, 4, seed=1)
    want = feature_axis_distillation(student.bfloat16().double(), teacher.half().double())
    found = feature_axis_distillation(student.bfloat16(), teacher.half())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-6)
    # Squares of these overflow in float16.
    big = feature_axis_distillation((1e3 * student).half(), (1e3 * teacher).half())
    assert big.isfinite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(teacher=torch.zeros(2, 1, 5, 3)), r"teacher must be \[B, T, D\].*broadcast"),
        (dict(student=torch.zeros(5, 3)), r"student must be \[B, T, D\]"),
        (dict(teacher=torch.zeros(2, 5, 4)), "differ in sequences or features"),
        (dict(teacher=torch.zeros(1, 5, 3)), "differ in sequences or features"),
        (dict(teacher=torch.zeros(2, 0, 3)), "no frame in"),
        (dict(teacher=torch.zeros(2, 5, 3, requires_grad=True)), "detach its features"),
        (dict(axis="batch"), "axis must be 'feature' or 'time'"),
        (dict(reduction="sum"), "reduction must be 'mean' or 'none'"),
        (dict(l1_weight=1.0), "of axis 'time' alone"),
        (dict(axis="time", l1_weight=-1.0), "must be a number >= 0"),
        (dict(mask=torch.ones(2, 4) > 0), r"mask must be bool \(2, 5\)"),
        (dict(mask=torch.ones(2, 5)), r"mask must be bool \(2, 5\), got torch.float32"),
    ],
)
def test_bad_input(changes, message):
    options = dict(student=torch.ones(2, 5, 3), teacher=torch.ones(2, 5, 3)) | changes
    with pytest.raises(ValueError, match=message) as raised:
        feature_axis_distillation(**options)
    assert "\n" not in str(raised.value)


# ---- where words stand


def test_padded_rows_stay_in_their_places_and_cost_what_a_crop_costs():
    states, student = features(2, 3, 4), features(2, 8, 4, seed=1)
    rows, mask = align_text(states, 8)
    assert torch.equal(rows[:, :3], states)
    assert mask.tolist() == [[True] * 3 + [False] * 5] * 2
    found = feature_axis_distillation(student, rows, mask=mask)
    torch.testing.assert_close(found, feature_axis_distillation(student, states))
    fewer, mask = align_text(states, 2)
    assert torch.equal(fewer, states[:, :2])
    assert mask.all()


def test_stretched_rows_last_as_long_as_their_words():
    """Frames of 20 ms; a word shorter than a frame has one, and of overlapping ones the later."""
    states = torch.arange(1.0, 6.0)[None, :, None]
    spans = [[0.02, 0.08], [0.08, 0.081], [0.12, 0.2], [0.16, 0.2], [0.24, 0.24]]
    rows, mask = align_text(states, 12, align="stretch", spans=torch.tensor([spans]))
    assert rows[0, :, 0].tolist() == [0, 1, 1, 1, 2, 0, 3, 3, 4, 4, 0, 0]
    assert torch.equal(mask, rows[..., 0] > 0)
    spans[0] = [float("nan")] * 2
    rows, mask = align_text(states, 12, align="stretch", spans=torch.tensor([spans]))
    assert rows[0, :, 0].tolist() == [0, 0, 0, 0, 2, 0, 3, 3, 4, 4, 0, 0]
    half, _ = align_text(states, 6, align="stretch", spans=torch.tensor([spans]), frame_rate=25.0)
    assert half[0, :, 0].tolist() == [0, 0, 2, 3, 4, 0]
    nothing, mask = align_text(states[:, :0], 4, align="stretch", spans=torch.zeros(1, 0, 2))
    assert nothing.shape == (1, 4, 1)
    assert not mask.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(align="time"), "align must be 'pad' or 'stretch'"),
        (dict(states=torch.zeros(3, 4)), r"expected states \[B, W, D\]"),
        (dict(frames=0), "frames >= 1"),
        (dict(spans=torch.zeros(2, 3, 2)), "for align='stretch'"),
        (dict(align="stretch"), r"needs spans \[2, 3, 2\], got None"),
        (dict(align="stretch", spans=torch.zeros(2, 2, 2)), r"got \(2, 2, 2\)"),
    ],
)
def test_words_that_cannot_be_placed(changes, message):
    with pytest.raises(ValueError, match=message):
        align_text(**(dict(states=torch.zeros(2, 3, 4), frames=5) | changes))
