"""The clipped teacher and the learned window of MGSR against closed forms."""

import math

import pytest
import torch

from stillhouse import ops
from stillhouse.methods.language import DACKL, clipped_kl

DOUBLE = torch.float64


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, 2, 3, 11, generator=generator, dtype=DOUBLE)
    return student.requires_grad_(), teacher


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def mask_by_hand(t, lower, upper, softness, keep=()):
    """m of one row of teacher logits, class by class."""
    p = t.softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda k: -p[k])
    result, before = [0.0] * len(p), 0.0
    for k in order:
        place = before + p[k] / 2
        before += p[k]
        inside = 1 / (1 + math.exp((lower - place) / softness))
        result[k] = inside / (1 + math.exp((place - upper) / softness))
    for k in (order[0], *keep):
        result[k] = 1.0
    return torch.tensor(result, dtype=DOUBLE)


# The clipped teacher ------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinate", ["mass", "rank"])
def test_a_window_of_everything_is_forward_kl(logits, coordinate):
    student, teacher = logits
    found = clipped_kl(student, teacher, 0.0, 1.0, coordinate=coordinate, softness=1e-9)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(found, (p * (p / q).log()).sum(-1), rtol=1e-12, atol=1e-13)
    (slope,) = gradient(found.sum(), student)
    torch.testing.assert_close(slope, q - p, rtol=1e-10, atol=1e-13)


def test_a_certain_teacher_is_cross_entropy(logits):
    student, _ = logits
    teacher = torch.full_like(student, -torch.inf).detach()
    teacher[..., 4] = 1.0
    for window in ((0.0, 1.0), (0.0, 0.3), (0.6, 0.9)):
        found = clipped_kl(student, teacher, *window)
        torch.testing.assert_close(found, -student.log_softmax(-1)[..., 4])
    (slope,) = gradient(found.sum(), student)
    torch.testing.assert_close(slope, student.softmax(-1) - (teacher == 1.0).double())


def test_value_and_gradient_by_hand(logits):
    student, teacher = logits
    lower, upper, softness = 0.15, 0.8, 0.07
    keep = torch.tensor([[1, 2, -100], [0, 10, 5]])
    found = clipped_kl(student, teacher, lower, upper, softness=softness, keep=keep)
    (slope,) = gradient(found.sum(), student)
    for row in range(6):
        i, j = divmod(row, 3)
        kept = [int(keep[i, j])] if keep[i, j] >= 0 else []
        weighted = mask_by_hand(teacher[i, j], lower, upper, softness, kept)
        weighted = weighted * teacher[i, j].softmax(-1)
        target, q = weighted / weighted.sum(), student[i, j].detach().softmax(-1)
        torch.testing.assert_close(found[i, j], (target * (target / q).log()).sum())
        torch.testing.assert_close(slope[i, j], q - target)


def test_rank_takes_the_classes_one_by_one():
    """A hard window of half of the ranks keeps five of ten, whatever their mass."""
    teacher = torch.arange(10, 0, -1, dtype=DOUBLE)[None] * 2
    student = torch.zeros(1, 10, dtype=DOUBLE)
    found = clipped_kl(student, teacher, 0.0, 0.5, coordinate="rank", softness=1e-6)
    p = teacher[:, :5].softmax(-1)
    torch.testing.assert_close(found, (p * p.log()).sum(-1) + math.log(10))


def test_gradients_of_window_and_logits(logits):
    student, teacher = logits
    lower, upper = torch.rand(2, 2, 3, dtype=DOUBLE) * 0.4 + torch.tensor([[[0.05]], [[0.5]]])
    inputs = (student, lower.requires_grad_(), upper.requires_grad_())

    def loss(z, l, u):  # noqa: E741
        return clipped_kl(z, teacher, l, u)

    assert torch.autograd.gradcheck(loss, inputs, atol=1e-7)


def test_gradient_to_the_mask_is_p_of_difference(logits):
    """dL / d log m_k = p'_k (d_k - L), d = log p' - log q: through l, by the chain of its m."""
    student, teacher = (x.detach()[0, 0] for x in logits)
    lower = torch.tensor(0.2, dtype=DOUBLE, requires_grad=True)
    loss = clipped_kl(student, teacher, lower, 0.9)
    m = mask_by_hand(teacher, 0.2, 0.9, 0.05)
    target = m * teacher.softmax(-1)
    target = target / target.sum()
    d = (target / student.softmax(-1)).log()
    step = 1e-6
    up, down = (mask_by_hand(teacher, 0.2 + s, 0.9, 0.05).log() for s in (step, -step))
    expected = (target * (d - loss.detach()) * (up - down) / (2 * step)).sum()
    torch.testing.assert_close(gradient(loss, lower)[0], expected, rtol=1e-6, atol=1e-9)


def test_the_likeliest_class_and_the_label_are_never_clipped():
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=DOUBLE).log()
    student = torch.zeros(1, 4, dtype=DOUBLE)
    # The window leaves all of them out but the likeliest, whose place is 0.25.
    alone = clipped_kl(student, teacher, 0.97, 0.99, softness=1e-3)
    torch.testing.assert_close(alone, torch.tensor([math.log(4)], dtype=DOUBLE))
    label = torch.tensor([1])
    both = clipped_kl(student, teacher, 0.97, 0.99, softness=1e-3, keep=label)
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    torch.testing.assert_close(both, torch.tensor([math.log(4) - entropy], dtype=DOUBLE))
    several = clipped_kl(student, teacher, 0.97, 0.99, softness=1e-3, keep=torch.arange(4)[None])
    torch.testing.assert_close(several, ops.divergence(student, teacher, "forward_kl"))


def test_excluded_columns_stay_out(logits):
    student, teacher = (x.detach().clone() for x in logits)
    whole = clipped_kl(student[..., :8], teacher[..., :8], 0.1, 0.9)
    student[..., 8:] = teacher[..., 8:] = -torch.inf
    lower = torch.full((2, 3), 0.1, dtype=DOUBLE, requires_grad=True)
    found = clipped_kl(student.requires_grad_(), teacher, lower, 0.9)
    torch.testing.assert_close(found, whole)
    assert all(x.isfinite().all() for x in gradient(found.sum(), student, lower))


def test_lower_precision_is_computed_in_float32(logits):
    student, teacher = (x.detach() for x in logits)
    half = student.bfloat16(), teacher.bfloat16()
    found = clipped_kl(*half, 0.1, 0.9)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, clipped_kl(*(x.float() for x in half), 0.1, 0.9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lower=0.5, upper=0.5), "0 <= lower < upper <= 1"),
        (dict(lower=torch.tensor([0.1, 0.95])), "0 <= lower < upper <= 1"),
        (dict(lower=-0.1), "0 <= lower < upper <= 1"),
        (dict(upper=1.1), "0 <= lower < upper <= 1"),
        (dict(upper=math.nan), "0 <= lower < upper <= 1"),
        (dict(softness=0.0), "softness must be a positive number, got 0.0"),
        (dict(coordinate="logit"), "coordinate must be 'mass' or 'rank', got 'logit'"),
        (dict(keep=torch.tensor([0, 5])), "classes below 5, or -100 for none"),
        (dict(keep=torch.tensor([0, -1])), "classes below 5, or -100 for none"),
        (dict(teacher_logits=torch.zeros(2, 5, requires_grad=True)), "detach its logits"),
        (dict(teacher_logits=torch.zeros(2, 6)), "6"),
    ],
)
def test_bad_windows(changes, message):
    options = dict(
        student_logits=torch.zeros(2, 5), teacher_logits=torch.zeros(2, 5), lower=0.1, upper=0.9
    )
    with pytest.raises(ValueError, match=message):
        clipped_kl(**(options | changes))


# The learned window -------------------------------------------------------------------------------


def test_every_window_holds_half_of_the_mass(logits):
    student, teacher = (x.detach().float() for x in logits)
    dac = DACKL(features=5, hidden=7)
    lower, upper = dac.window(student, teacher)
    torch.testing.assert_close(lower, torch.full((2, 3), 0.5 / (1 + math.exp(4))))
    share = 1 / (1 + math.exp(-2.2))
    torch.testing.assert_close(upper, lower + 0.5 + (0.5 - lower) * share)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for each in dac.parameters():
                each.copy_(30 * torch.randn(each.shape, generator=generator))
        lower, upper = dac.window(student, teacher)
        assert ((lower >= 0) & (upper - lower >= 0.5 - 1e-6) & (upper <= 1)).all()
        dac(student, teacher)  # no window of it is refused


def test_the_network_by_hand(logits):
    student, teacher = (x.detach().float() for x in logits)
    dac = DACKL(features=4, hidden=6, seed=3)
    with torch.no_grad():
        dac.second.normal_(generator=torch.Generator().manual_seed(0))
    log_p, log_q = teacher[1, 2].log_softmax(-1), student[1, 2].log_softmax(-1)
    ids = sorted(range(11), key=lambda k: -log_p[k])[:4]
    entropy = -(log_p.exp() * log_p).sum()
    x = torch.stack([*log_p[ids], *log_q[ids], entropy])
    inner = torch.nn.functional.gelu(dac.first @ x + dac.first_bias)
    low, high = torch.sigmoid(dac.second @ inner + dac.second_bias)
    lower, upper = dac.window(student, teacher)
    torch.testing.assert_close(lower[1, 2], low / 2)
    torch.testing.assert_close(upper[1, 2], low / 2 + 0.5 + (0.5 - low / 2) * high)
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = dac(student, teacher, labels)
    torch.testing.assert_close(found, clipped_kl(student, teacher, lower, upper, keep=labels))


def test_the_loss_trains_the_window_and_not_by_its_input(logits):
    student, teacher = (x.detach().float() for x in logits)
    student.requires_grad_()
    dac = DACKL(features=4, hidden=6)
    with torch.no_grad():
        dac.second.normal_(generator=torch.Generator().manual_seed(0))
    loss = dac(student, teacher).sum()
    loss.backward()
    assert dac.second.grad.abs().sum() > 0
    assert dac.second_bias.grad.abs().sum() > 0
    window = [x.detach() for x in dac.window(student, teacher)]
    fixed = clipped_kl(student, teacher, *window).sum()
    torch.testing.assert_close(student.grad, gradient(fixed, student)[0])
    before = loss.item()
    with torch.no_grad():
        for each in dac.parameters():
            each -= 0.01 * each.grad
    assert dac(student, teacher).sum().item() < before


def test_weights_come_from_the_seed_alone():
    state = torch.get_rng_state()
    first, second, other = DACKL(4, 6), DACKL(4, 6), DACKL(4, 6, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.first, second.first)
    assert not torch.equal(first.first, other.first)


def test_impossible_networks():
    with pytest.raises(ValueError, match="features=6 are more than the 5 classes"):
        DACKL(features=6)(torch.zeros(1, 5), torch.zeros(1, 5))
    with pytest.raises(ValueError, match="features and hidden must be at least 1, got 0, 3"):
        DACKL(0, 3)
