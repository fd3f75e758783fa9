"""The loss across architectures against its formula, training with it, and the recipe."""

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from stillhouse.data import DataUnavailable, debian_packages
from stillhouse.methods.language import CrossArchitectureLoss, Seq2SeqRows
from stillhouse.recipes.language import debian_sections, decoding_speed
from stillhouse.recipes.language import return_of_encoder as recipe
from stillhouse.recipes.language.decoder_only import DecoderOnly, parameters
from stillhouse.report import Report
from stillhouse.train import DivergenceObjective, LogitRows, ResponseSource, RowIndex

VOCABULARY, START, END = 40, 1, 2
SOURCE = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
TARGET = [[20, END], [21, 22, 23, END], [24, 25, END]]
GOLD = [[26, END], [27, END], [28, 29, END]]


def index_of(target):
    place = torch.arange(len(target))
    return RowIndex(place, target, place)


@pytest.fixture
def given():
    """Logits of student and teacher [6, 11] and targets."""
    student, teacher = 2 * torch.randn(2, 6, 11, dtype=torch.float64)
    return student.requires_grad_(), teacher, torch.randint(11, (6,))


def call(loss, student, teacher, target, **batch):
    index = index_of(target)
    return loss(LogitRows(student * 1, index), LogitRows(teacher, index), batch)


def kl(student, teacher):
    p = teacher.softmax(-1)
    return (p * (p.log() - student.log_softmax(-1))).sum(-1).mean()


# The formula --------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_one_set_of_rows(alpha, given):
    student, teacher, target = given
    loss = call(CrossArchitectureLoss(alpha), student, teacher, target)["loss"]
    expected = alpha * kl(student, teacher) + (1 - alpha) * cross_entropy(student, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, student)[0]
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_labels_of_their_own(alpha, given):
    student, teacher, target = given
    gold = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (4,))
    rows = LogitRows(gold * 1, index_of(labels))
    parts = call(CrossArchitectureLoss(alpha), student, teacher, target, gold=rows)
    divergence, entropy = kl(student, teacher), cross_entropy(gold, labels)
    expected = alpha * divergence + (1 - alpha) * entropy
    torch.testing.assert_close(parts["loss"], expected)
    found = torch.autograd.grad(
        parts["loss"], (student, gold), materialize_grads=True, allow_unused=True
    )
    wanted = torch.autograd.grad(expected, (student, gold))
    torch.testing.assert_close(found, wanted)
    if 0 < alpha < 1:
        torch.testing.assert_close(parts["divergence"], divergence.detach())
        torch.testing.assert_close(parts["cross_entropy"], entropy.detach())


def test_alpha_one_does_not_look_at_labels(given):
    student, teacher, target = given
    broken = LogitRows(torch.full((6, 11), torch.nan).double(), index_of(target))
    parts = call(CrossArchitectureLoss(1.0), student, teacher, target, gold=broken)
    torch.testing.assert_close(parts["loss"], kl(student, teacher))


def test_counts_of_a_whole_step_replace_those_of_the_batch(given):
    student, teacher, target = given
    rows = LogitRows(student * 1, index_of(target))
    options = dict(gold=rows, denominator=12, gold_denominator=24)
    loss = call(CrossArchitectureLoss(0.5), student, teacher, target, **options)["loss"]
    expected = 0.25 * kl(student, teacher) + 0.125 * cross_entropy(student, target)
    torch.testing.assert_close(loss, expected)


def test_the_authors_mean_is_that_of_padded_answers(make_student, make_teacher):
    """Over all B T rows, with what either model says behind the end of an answer."""
    student, teacher, pad = make_student().eval(), make_teacher(), 0
    rows = Seq2SeqRows(student, teacher)
    longest = max(map(len, TARGET))
    padded = [each + [pad] * (longest - len(each)) for each in TARGET]
    found = CrossArchitectureLoss(1.0)(*rows(SOURCE, padded))["loss"]
    each = []
    for x, y in zip(SOURCE, padded, strict=True):
        ours = student(
            torch.tensor([x]), decoder_input_ids=torch.tensor([[START, *y[:-1]]])
        ).logits[0]
        theirs = teacher(torch.tensor([x + y])).logits[0, len(x) - 1 : -1]
        each.append(kl(ours, theirs))
    torch.testing.assert_close(found, torch.stack(each).mean())
    # Padding drowns the answers: it is another number.
    assert (found - CrossArchitectureLoss(1.0)(*rows(SOURCE, TARGET))["loss"]).abs() > 1e-3


# The vocabulary -----------------------------------------------------------------------------------


def test_truncation_is_minus_infinity_in_the_columns(given):
    student, teacher, target = given
    wide = torch.cat([teacher, torch.full((6, 3), -30.0).double()], 1)
    cut = call(CrossArchitectureLoss(1.0), student, wide, target)["loss"]
    closed = torch.cat([student, torch.full((6, 3), -torch.inf).double()], 1)
    shut = torch.cat([teacher, torch.full((6, 3), -torch.inf).double()], 1)
    torch.testing.assert_close(cut, call(CrossArchitectureLoss(1.0), closed, shut, target)["loss"])
    torch.testing.assert_close(cut, kl(student, teacher))


def test_a_wider_student_is_cut_and_gets_no_gradient_there(given):
    student, teacher, target = given
    wide = torch.cat([student.detach(), torch.ones(6, 2).double()], 1).requires_grad_()
    loss = call(CrossArchitectureLoss(1.0), wide, teacher, target)["loss"]
    torch.testing.assert_close(loss, kl(student, teacher))
    gradient = torch.autograd.grad(loss, wide)[0]
    assert gradient[:, 11:].abs().max() == 0
    assert gradient[:, :11].abs().max() > 0
    # The untruncated distribution has mass there, so it is another divergence.
    whole = torch.cat([teacher, torch.full((6, 2), -torch.inf).double()], 1)
    p = whole.softmax(-1)
    untruncated = (torch.xlogy(p, p) - p * wide.log_softmax(-1)).sum(-1).mean()
    assert (untruncated - loss).abs() > 1e-2


def test_a_teacher_s_mass_is_not_dropped_in_silence(given):
    student, teacher, target = given
    for mass, raises in ((0.9e-4, False), (1.1e-4, True)):
        # A column behind the student's with this share of the last row.
        column = torch.full((6, 1), -torch.inf).double()
        column[-1] = teacher[-1].logsumexp(-1) + math.log(mass / (1 - mass))
        wide = torch.cat([teacher, column], 1)
        if raises:
            message = "the teacher has 0.00011 of a row's mass in columns 11 to 11"
            with pytest.raises(ValueError, match=message) as raised:
                call(CrossArchitectureLoss(), student, wide, target)
            assert "\n" not in str(raised.value)
            call(CrossArchitectureLoss(dropped=1e-3), student, wide, target)
        else:
            call(CrossArchitectureLoss(), student, wide, target)


def test_heads_of_two_widths(make_student, make_teacher):
    """The teacher's surplus columns are read off its head where there are no logits."""
    teacher = make_teacher(vocab_size=VOCABULARY + 3)
    with pytest.raises(ValueError, match=f"in columns {VOCABULARY} to {VOCABULARY + 2}"):
        CrossArchitectureLoss()(*Seq2SeqRows(make_student(), teacher)(SOURCE, TARGET))
    wide = make_student(vocab_size=VOCABULARY + 5)
    student, said, _ = Seq2SeqRows(wide, make_teacher())(SOURCE, TARGET)
    found = CrossArchitectureLoss(1.0)(student, said, {})["loss"]
    torch.testing.assert_close(found, kl(student.logits[:, :VOCABULARY], said.logits))


# Training -----------------------------------------------------------------------------------------


def trained(student, loss, rows, steps=4):
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(rows).backward()
        optimizer.step()
    return student.state_dict()


@pytest.mark.parametrize("which", ["ours", "t5"])
@pytest.mark.parametrize("gold", [None, GOLD])
def test_alpha_zero_is_training_on_labels_to_the_bit(which, gold, make_student, make_teacher):
    ours = make_student(which)
    plain, by_hand = copy.deepcopy(ours), copy.deepcopy(ours)
    rows = Seq2SeqRows(ours, make_teacher())
    zero, entropy = CrossArchitectureLoss(0.0), DivergenceObjective("cross_entropy")
    assert not zero.needs_teacher
    found = trained(ours, lambda r: zero(*r(SOURCE, TARGET, gold=gold))["loss"], rows)
    labels = TARGET if gold is None else gold
    expected = trained(
        plain, lambda r: entropy(r(SOURCE, labels)[0], None, {})["loss"], Seq2SeqRows(plain)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    start, each = by_hand.config.decoder_start_token_id, []
    for x, y in zip(SOURCE, labels, strict=True):
        ids = torch.tensor([[start, *y[:-1]]])
        logits = by_hand(input_ids=torch.tensor([x]), decoder_input_ids=ids).logits[0]
        each.append(cross_entropy(logits, torch.tensor(y), reduction="none"))
    value = zero(*Seq2SeqRows(by_hand)(SOURCE, TARGET, gold=gold))["loss"]
    torch.testing.assert_close(value, torch.cat(each).mean())


@pytest.mark.parametrize("student", ["ours", "t5", "bart"])
@pytest.mark.parametrize("teacher", ["llama", "gpt2"])
def test_gradients_are_those_of_single_calls(student, teacher, make_student, make_teacher):
    """alpha KL on answers + (1 - alpha) CE on labels, sequence by sequence in plain torch."""
    student, teacher, alpha = make_student(student).eval(), make_teacher(teacher), 0.7
    CrossArchitectureLoss(alpha)(*Seq2SeqRows(student, teacher)(SOURCE, TARGET, gold=GOLD))[
        "loss"
    ].backward()
    found = {
        name: each.grad.clone()
        for name, each in student.named_parameters()
        if each.grad is not None
    }
    student.zero_grad()
    start = student.config.decoder_start_token_id
    divergence, entropy = [], []
    for x, y, z in zip(SOURCE, TARGET, GOLD, strict=True):
        said = [
            student(
                input_ids=torch.tensor([x]), decoder_input_ids=torch.tensor([[start, *each[:-1]]])
            ).logits[0]
            for each in (y, z)
        ]
        p = teacher(torch.tensor([x + y])).logits[0, len(x) - 1 : -1].softmax(-1)
        divergence.append((p * (p.log() - said[0].log_softmax(-1))).sum(-1))
        entropy.append(cross_entropy(said[1], torch.tensor(z), reduction="none"))
    loss = alpha * torch.cat(divergence).mean() + (1 - alpha) * torch.cat(entropy).mean()
    loss.backward()
    assert len(found) > 10
    for name, each in student.named_parameters():
        if each.grad is not None:
            torch.testing.assert_close(found[name], each.grad, atol=2e-5, rtol=1e-3)


def test_alpha_one_has_no_gradient_of_labels(make_student, make_teacher):
    rows = Seq2SeqRows(make_student(), make_teacher())
    gradients = []
    for gold in (GOLD, [[9, 9, END]] * 3, None):
        rows.student.zero_grad()
        CrossArchitectureLoss(1.0)(*rows(SOURCE, TARGET, gold=gold))["loss"].backward()
        gradients.append([each.grad.clone() for each in rows.student.parameters()])
    for other in gradients[1:]:
        assert all(map(torch.equal, gradients[0], other))


def test_answers_of_the_student_come_from_a_response_source(make_student, make_teacher):
    """The on-policy share moves as it does for any student; the loss falls on its own answers."""
    student = make_student("t5")
    options = dict(dataset=TARGET, student=student, max_new_tokens=4, per="row", seed=1)
    source = ResponseSource(SOURCE, share=0.5, eos_token_id=END, **options)
    rows, loss = Seq2SeqRows(student, make_teacher()), CrossArchitectureLoss(1.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        drawn = source.batch(3)
        value = loss(*rows(drawn.prompts(), drawn.responses()))["loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert student.training
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_a_share_outside_the_unit_interval_raises(alpha):
    with pytest.raises(ValueError, match=r"alpha is a share in \[0, 1\]"):
        CrossArchitectureLoss(alpha)


def test_rows_that_are_not_aligned_raise(given):
    student, teacher, target = given
    rows = LogitRows(student * 1, index_of(target)), LogitRows(teacher, index_of((target + 1) % 11))
    with pytest.raises(ValueError, match="the two batches are not aligned"):
        CrossArchitectureLoss()(*rows, {})


def test_the_command_takes_it_for_decoder_only_students(assert_learns):
    assert_learns("return-of-encoder", method_options="alpha=0.5")


# The recipe ---------------------------------------------------------------------------------------


def test_models_of_the_recipe_have_one_size():
    for width, layers in ((64, 6), (256, 12)):
        config = recipe.sizes(width, layers)
        ours = parameters(recipe.EncoderDecoder(config))
        assert parameters(recipe.decoder_only(config, 0)) == pytest.approx(ours, rel=0.002)


def test_the_recipe_s_decoder_caches_what_it_reads():
    model = DecoderOnly(recipe.sizes(64, 6), 3, seed=0).eval().double()
    ids = torch.randint(recipe.VOCABULARY, (2, 9))
    past = [decoding_speed.KeyValues(9) for _ in model.blocks]
    steps = [model.read(part, past) for part in ids.split([4, 1, 3, 1], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), model.read(ids))


def test_recipe_in_a_few_steps(tmp_path, monkeypatch):
    try:
        debian_packages()
    except DataUnavailable as error:
        pytest.skip(str(error))
    small = dict(TEACHER_STEPS=3, TEACHER_BATCH=8, PAIRS=24, EPOCHS=2, BATCH=12)
    for name, value in small.items():
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(debian_sections, "TEST", 60)
    for name, value in dict(READ=16, ROUNDS=1, BATCH=1).items():
        monkeypatch.setattr(decoding_speed, name, value)
    report = Report("return-of-encoder", tmp_path)
    recipe.run(report, range(2), budget=math.inf)
    report.save()
    assert report.seeds == [0, 1]
    assert len(report.claims) == 4
    assert report.claims[-1]["measured"] == pytest.approx(1 / 3)
    assert [
        row["encoder"] for row in report.tables[f"{recipe.LABELS}, 6 layers shared out otherwise"]
    ] == [
        3,
        4,
        5,
    ]
    assert {path.stem for path in tmp_path.glob("*.png")} == {"accuracy", "splits"}
