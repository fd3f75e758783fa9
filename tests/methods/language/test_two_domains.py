"""LLaVA-MoD's recipe: its text, its students, what it measures, and a short run of it."""

import math

import pytest
import torch

from stillhouse import data
from stillhouse.recipes.language import llava_mod as recipe
from stillhouse.recipes.language.expert_use import information
from stillhouse.recipes.language.two_domains import LENGTH, PROMPT, SIZE, BlockLM, TwoDomains
from stillhouse.report import Report

DOUBLE = torch.float64


@pytest.fixture(scope="module")
def text():
    try:
        return TwoDomains()
    except data.DataUnavailable as error:
        pytest.skip(str(error))


def test_pairs_are_told_apart_by_one_word(text):
    batch = text.pairs(20, torch.Generator().manual_seed(0), held=True)
    ids, labels = batch["input_ids"], batch["labels"]
    assert batch["pairs"] == 40
    assert ids.shape == (80, LENGTH)
    assert (labels[:, :PROMPT] == -100).all()
    assert torch.equal(labels[:, PROMPT:], ids[:, PROMPT:])
    differs = ids[:40] != ids[40:]
    assert differs.any(1).all()
    assert not differs[:, :PROMPT].any()
    span = LENGTH - differs.flip(1).int().argmax(1) - differs.int().argmax(1)
    assert span.max() <= 12
    for row, domain in ((0, 0), (39, 1)):
        held = text.symbols[domain, SIZE * 9 // 10 :].unfold(0, LENGTH, 1)
        assert (held == ids[row]).all(1).any()
        assert not (held == ids[row + 40]).all(1).any()


def test_windows_are_of_their_domain(text):
    ids, domains = text.windows(50, torch.Generator().manual_seed(0))
    assert domains.tolist() == [0] * 50 + [1] * 50
    runs = text.symbols.unfold(1, LENGTH, 1)
    for row in (0, 99):
        assert (runs[domains[row]] == ids[row]).all(1).any()
        assert not (runs[1 - domains[row]] == ids[row]).all(1).any()


def test_a_students_logits_are_causal():
    model = BlockLM(8, 4, 2, seed=0)
    ids = torch.arange(40).view(2, 20)
    other = ids.clone()
    other[:, 12] += 1
    with torch.no_grad():
        first, second = model(ids), model(other)
    assert torch.equal(first[:, :12], second[:, :12])
    assert not torch.equal(first[:, 12], second[:, 12])
    assert torch.equal(first[:, 20 - 1], model(ids[:, 12:])[:, -1].detach())


def test_information_by_hand():
    """Windows of four choices; the second mixture knows the domain, the first knows nothing."""
    even = torch.tensor([[2.0, 2], [2, 2], [2, 2], [2, 2]], dtype=DOUBLE)
    sharp = torch.tensor([[4.0, 0], [4, 0], [0, 4], [0, 4]], dtype=DOUBLE)
    partly = torch.tensor([[3.0, 1], [3, 1], [2, 2], [2, 2]], dtype=DOUBLE)
    domains = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    found = information(torch.stack([even, sharp]), domains)
    torch.testing.assert_close(found, torch.tensor([math.log(2), 0.0], dtype=DOUBLE))
    joint = {(0, 0.625): 0.375, (0, 0.375): 0.125, (1, 0.625): 0.25, (1, 0.375): 0.25}
    want = sum(p * math.log(p / (0.5 * expert)) for (_, expert), p in joint.items())
    assert information(partly[None], domains)[0].item() == pytest.approx(want)


def test_recipe_in_a_few_steps(text, tmp_path, monkeypatch):
    for name in ("TEACHER_STEPS", "STEPS", "PREFERENCE_STEPS"):
        monkeypatch.setattr(recipe, name, 40)
    for name in ("PAIRS", "HELD_PAIRS", "HELD"):
        monkeypatch.setattr(recipe, name, 64)
    report = Report("llava-mod", tmp_path)
    recipe.run(report, range(1), budget=math.inf)
    report.save()
    assert len(report.claims) == 6
    kl = {
        r["student"]: r["forward_kl"] for r in report.tables["distance from the teacher, held out"]
    }
    assert max(kl.values()) < 1.2  # nats; before they learn it is 1.8
    assert len(kl) == 6
    assert len(set(kl.values())) == 6
    told = report.tables["pairs of a true continuation and one with a foreign word"]
    assert [row["model"] for row in told] == [
        "teacher",
        "student",
        "student, reference: teacher",
        "student, reference: itself before",
    ]
    assert {path.stem for path in tmp_path.glob("*.png")} == {"kl", "experts"}
