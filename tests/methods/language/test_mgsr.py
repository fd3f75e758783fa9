"""MGSR: spans, and the objective; the clipped teacher has a file of its own."""

import math

import pytest
import torch

from stillhouse import ops
from stillhouse.methods.language import (
    DACKL,
    MGSRLoss,
    clipped_kl,
    span_correlation,
    span_products,
)
from stillhouse.recipes.language import mgsr as recipe
from stillhouse.report import Report
from stillhouse.train import LogitRows, RowIndex, supervised_rows

DOUBLE = torch.float64


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


# Spans --------------------------------------------------------------------------------------------


@pytest.fixture
def sequence():
    generator = torch.Generator().manual_seed(1)
    student, teacher = 2 * torch.randn(2, 9, 6, generator=generator, dtype=DOUBLE)
    return student.requires_grad_(), teacher


def pair_by_hand(student, teacher, i):
    q, p = student.softmax(-1), teacher.softmax(-1)
    return ((q[i] * q[i + 1] - p[i] * p[i + 1]) ** 2).sum()


def test_pairs_of_adjacent_rows_within_spans(sequence):
    found = span_correlation(*sequence, [(0, 3), (4, 5), (5, 7)])
    pairs = [pair_by_hand(*sequence, i) for i in (0, 1, 5)]
    torch.testing.assert_close(found, sum(pairs) / 3)


def test_the_gradient_is_that_of_the_formula(sequence):
    """E_i q_{i+1} + E_{i-1} q_{i-1}, and then the softmax's Jacobian."""
    student, teacher = sequence
    spans, pairs = [(1, 4), (4, 8)], (1, 2, 4, 5, 6)
    (found,) = gradient(span_correlation(student, teacher, spans), student)
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    slope = torch.zeros_like(q)
    for i in pairs:
        error = 2 * (q[i] * q[i + 1] - p[i] * p[i + 1]) / len(pairs)
        slope[i] += error * q[i + 1]
        slope[i + 1] += error * q[i]
    expected = q * (slope - (q * slope).sum(-1, keepdim=True))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_equal_sides_and_permuted_classes(sequence):
    student, teacher = sequence
    assert span_correlation(student, student.detach(), [(0, 9)]) == 0
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    whole = span_correlation(student, teacher, [(0, 9)])
    moved = span_correlation(student[:, order], teacher[:, order], [(0, 9)])
    torch.testing.assert_close(whole, moved)


def test_spans_add_up_and_a_border_takes_one_pair(sequence):
    whole, cut = (span_correlation(*sequence, s) for s in ([(0, 9)], [(0, 4), (4, 9)]))
    parts = [span_correlation(*sequence, [s]) for s in ((0, 4), (4, 9))]
    torch.testing.assert_close(7 * cut, 3 * parts[0] + 4 * parts[1])
    torch.testing.assert_close(8 * whole - 7 * cut, pair_by_hand(*sequence, 3))


def test_products_are_made_again_for_the_gradient(monkeypatch):
    """In chunks: three of them, twice."""
    student, teacher = torch.randn(2, 150, 5, dtype=DOUBLE, generator=torch.Generator())
    calls, squares = [], span_products._squares

    def counted(*args):
        calls.append(len(args[2]))
        return squares(*args)

    monkeypatch.setattr(span_products, "_squares", counted)
    loss = span_correlation(student.requires_grad_(), teacher, [(0, 150)])
    assert calls == [64, 64, 21]
    expected = sum(pair_by_hand(student, teacher, i) for i in range(149)) / 149
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, student), gradient(expected, student))
    assert sorted(calls) == [21, 21, 64, 64, 64, 64]


def test_half_precision_is_accumulated_in_float32():
    student, teacher = torch.randn(2, 4, 300, generator=torch.Generator().manual_seed(0)).half()
    found = span_correlation(student, teacher, [(0, 4)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, span_correlation(student.float(), teacher.float(), [(0, 4)]))


def test_without_a_pair_there_is_no_loss(sequence):
    student, teacher = sequence
    for spans in ([], [(2, 3), (5, 6)]):
        excluded = torch.where(torch.arange(6) < 5, student, -torch.inf)
        loss = span_correlation(excluded, teacher, spans)
        assert loss == 0
        assert gradient(loss, student)[0].abs().max() == 0


@pytest.mark.parametrize(
    "spans", [[(0, 3), (2, 5)], [(4, 6), (0, 3)], [(7, 10)], [(3, 3)], [(-1, 2)]]
)
def test_bad_spans(sequence, spans):
    with pytest.raises(ValueError, match="spans must be sorted, apart, not empty and within 9"):
        span_correlation(*sequence, spans)


def test_bad_rows(sequence):
    student, teacher = sequence
    with pytest.raises(ValueError, match=r"\[T, V\] of one shape"):
        span_correlation(student, teacher[:5], [(0, 2)])
    with pytest.raises(ValueError, match="detach its logits"):
        span_correlation(student, student, [(0, 2)])


# The objective ------------------------------------------------------------------------------------

LABELS = torch.tensor([[0, 1, 2, 3, 4, 5], [6, -100, -100, 7, 8, -100]])


class Letters:
    """A tokenizer of eleven letters, of which "d" is a stop."""

    def decode(self, ids):
        return "abc,efghijk"[ids[0]]


def rows(seed=0, labels=LABELS):
    index = supervised_rows(labels)
    generator = torch.Generator().manual_seed(seed)
    return (*torch.randn(2, len(index.row), 11, generator=generator, dtype=DOUBLE), index)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    """Targets are b c , e f of the first sequence, and h i of the second."""
    student, teacher, index = rows()
    given = student.clone().requires_grad_()
    objective = MGSRLoss((0.5, 2.0, 300.0), window=(0.1, 0.8), tokenizer=Letters())
    sides = LogitRows(given * 1, index), LogitRows(teacher, index)
    assert objective.spans(sides[0]) == [(0, 2), (3, 5), (5, 7)]
    parts = objective(*sides, {})
    own = student.clone().requires_grad_()
    sft = torch.nn.functional.cross_entropy(own, index.target)
    dac = clipped_kl(own, teacher, 0.1, 0.8, keep=index.target).mean()
    span = span_correlation(own, teacher, [(0, 2), (3, 5), (5, 7)])
    want = 0.5 * sft + 2 * dac + 300 * span
    torch.testing.assert_close(parts["loss"], want)
    for name, value in (("sft", sft), ("dac", dac), ("span", span)):
        torch.testing.assert_close(parts[name], value.detach())
        assert not parts[name].requires_grad
    torch.testing.assert_close(gradient(parts["loss"], given), gradient(want, own))
    assert parts["lower"].item() == pytest.approx(0.1)
    assert parts["upper"].item() == pytest.approx(0.8)
    minimum = torch.minimum(student.softmax(-1), teacher.softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(parts["acceptance"], minimum)


def test_letters_that_follow_no_space_are_one_word():
    """What separates is the chunker's: here every letter is a phrase."""
    student, _, index = rows()
    objective = MGSRLoss(tokenizer=Letters(), chunker=lambda text: [(i, i + 1) for i in range(2)])
    assert objective.spans(LogitRows(student, index)) == [(0, 1), (1, 2), (5, 6), (6, 7)]


def test_a_gap_in_the_targets_is_a_border():
    labels = torch.tensor([[0, 1, 2, -100, 4, 5], [6, 7, 8, 9, 10, 0]])
    student, _, index = rows(labels=labels)
    spans = MGSRLoss(tokenizer=Letters()).spans(LogitRows(student, index))
    assert spans == [(0, 2), (2, 4), (4, 9)]
    # Rows that are numbered on, but of other sequences: contexts that were drawn one by one.
    apart = RowIndex(torch.arange(9), index.target, torch.arange(9))
    spans = MGSRLoss(tokenizer=Letters()).spans(LogitRows(student, apart))
    # "i" and "a" alone are stop words.
    assert spans == [(i, i + 1) for i in (0, 1, 2, 3, 4, 6, 7)]


def test_the_learned_window_has_parameters_and_a_state():
    student, teacher, index = rows()
    objective, other = (MGSRLoss((1, 1, 0), features=4, hidden=5, seed=s) for s in (0, 1))
    parts = objective(LogitRows(student.clone(), index), LogitRows(teacher, index), {})
    parts["loss"].backward()
    assert len(list(objective.parameters())) == 4
    assert all(each.grad is not None for each in objective.parameters())
    other.load_state_dict(objective.state_dict())
    for ours, theirs in zip(objective.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    fixed = MGSRLoss((1, 1, 0), window=(0.0, 0.9))
    assert list(fixed.parameters()) == []
    assert fixed.state_dict() == {}


def test_two_micro_batches_with_a_shared_denominator_are_one_batch():
    """Of the parts that are means over rows; each batch has its own pairs."""
    student, teacher, index = rows()
    objective = MGSRLoss((1.0, 1.0, 0.0), window=(0.0, 0.9))
    whole = objective(LogitRows(student, index), LogitRows(teacher, index), {})["loss"]
    parts = []
    for part in (slice(0, 3), slice(3, 7)):
        piece = RowIndex(*(x[part] for x in index))
        sides = LogitRows(student[part], piece), LogitRows(teacher[part], piece)
        parts.append(objective(*sides, {"denominator": 7})["loss"])
    torch.testing.assert_close(sum(parts), whole)
    spanning = MGSRLoss((0.0, 0.0, 1.0), window=(0.0, 0.9), tokenizer=Letters())
    sides = LogitRows(student, index), LogitRows(teacher, index)
    half = spanning(*sides, {"denominator": 14})["loss"]
    torch.testing.assert_close(2 * half, spanning(*sides, {})["loss"])


def test_padded_columns_are_left_out():
    student, teacher, index = rows()
    objective = MGSRLoss(features=4, tokenizer=Letters())
    wide = torch.nn.functional.pad(student, (0, 3), value=5.0)
    sides = LogitRows(wide, index), LogitRows(torch.cat([teacher, teacher], 1), index)
    padded = objective(*sides, {"vocab_size": 11})
    whole = objective(LogitRows(student, index), LogitRows(teacher, index), {})
    for name, value in whole.items():
        torch.testing.assert_close(padded[name], value)


def test_no_rows_give_zero():
    student, teacher, index = rows(labels=torch.full((2, 4), -100))
    given = student.clone().requires_grad_()
    objective = MGSRLoss(features=4, tokenizer=Letters())
    parts = objective(LogitRows(given * 1, index), LogitRows(teacher, index), {})
    parts["loss"].backward()
    assert all(value == 0 for value in parts.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(weights=(1, 1)), "weights must be three numbers >= 0"),
        (dict(weights=(1, -1, 1)), "weights must be three numbers >= 0"),
        (dict(window=(0.9, 0.1)), "0 <= lower < upper <= 1"),
        (dict(window=(0.0, 0.5, 1.0)), "0 <= lower < upper <= 1"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        MGSRLoss(**options)


def test_what_it_cannot_do_without():
    student, teacher, index = rows()
    sparse = ops.SparseTeacher.from_logits(teacher.float(), k=4)
    with pytest.raises(ValueError, match="it needs a teacher's logits, got SparseTeacher"):
        MGSRLoss()(LogitRows(student, index), sparse, {})
    with pytest.raises(ValueError, match=r"pass tokenizer=, or weights=\(1, 1, 0\)"):
        MGSRLoss(features=4)(LogitRows(student, index), LogitRows(teacher, index), {})


def test_it_trains_a_language_model(tmp_path, assert_learns):
    """`stillhouse distill --method mgsr`: with spans, and a window in the optimiser."""
    from stillhouse.train.checkpoints import STATE_FILE

    assert_learns("mgsr", method_options="features=64", save_steps=6)
    state = torch.load(tmp_path / "run" / "checkpoint-6" / STATE_FILE)
    network = DACKL(features=64)
    assert not torch.equal(state["objective"]["dac"]["first"], network.first)
    network.load_state_dict(state["objective"]["dac"])


def test_it_revises_what_the_student_says_while_it_trains(distilled, monkeypatch):
    import stillhouse.methods.language.mgsr as module
    from stillhouse.methods import language

    calls = []

    def counted(student, teacher, responses, **options):
        calls.append(options)
        return language.revise(student, teacher, responses, **options)

    monkeypatch.setattr(module, "revise", counted)
    options = dict(on_policy=1.0, max_new_tokens=4, prompt_tokens=8, response_top_k=50)
    report = distilled("mgsr", method_options="features=64", **options)
    assert report.curves["loss"]["series"]["mgsr"][1][-1] > 0
    assert len(calls) == 6
    wanted = dict(rounds=1, score="kl", top_k=50, temperature=1.0, max_new_tokens=4)
    assert wanted.items() <= calls[0].items()


# The recipe ---------------------------------------------------------------------------------------


def test_recipe_in_a_few_steps(tmp_path, monkeypatch):
    for name in ("TEACHER_STEPS", "TUNING_STEPS", "STEPS"):
        monkeypatch.setattr(recipe, name, 12)
    monkeypatch.setattr(recipe, "PROMPTS", 8)
    report = Report("mgsr", tmp_path)
    recipe.run(report, range(2), budget=math.inf)
    report.save()
    assert report.seeds == [0, 1]
    assert len(report.claims) == 3
    assert len(report.tables["fidelity to the teacher, held out"]) == 7 + 3
    assert {path.stem for path in tmp_path.glob("*.png")} == {"window", "plane"}
