"""`stillhouse run` and `make claims` around recipes that take no time."""

import json
import math
import re
from types import ModuleType

import pytest

from stillhouse.methods.catalog import METHODS, Method
from stillhouse.recipes import runner


@pytest.fixture
def dice(monkeypatch):
    """A method whose recipe is ready at once."""
    method = Method("dice", "Dice", "0000.00000", "language", "game", ("divergence",), ("roll",))
    recipe = ModuleType("dice")

    def run(report, seeds, budget):
        for _ in report.within(budget, seeds):
            pass
        report.claim("every seed counts", report.seeds, 0)
        report.claim("six is more than seven", 6, 7)
        report.curve("pips", [1, 2], {"dice": [3.0, 4.0]})

    recipe.run = run
    monkeypatch.setattr(Method, "load_recipe", lambda self: recipe)
    monkeypatch.setitem(METHODS, "dice", method)
    return method


def test_run_leaves_report_and_plot(dice, tmp_path, capsys):
    report = runner.run("dice", 2, directory=tmp_path)
    content = json.loads((tmp_path / "dice" / "report.json").read_text())
    assert [claim["holds"] for claim in content["claims"]] == [True, False]
    assert content["claims"][0]["seeds"] == [0, 1]
    assert content["seconds"]["total"] > 0
    assert (tmp_path / "dice" / "pips.png").exists()
    assert report.seeds == [0, 1]
    assert "1 of 2 claims hold, seeds [0, 1], " in capsys.readouterr().out


def test_a_spent_budget_still_runs_one_seed(dice, tmp_path):
    assert runner.run("dice", 3, budget=0.0, directory=tmp_path).seeds == [0]


def test_claims_document_has_one_row_a_method(dice, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "METHODS", {"dice": dice})
    document = tmp_path / "docs" / "claims.md"
    runner.claims(2, document=document, directory=tmp_path / "runs")
    runner.claims(2, document=document, directory=tmp_path / "runs")
    rows = [line for line in document.read_text().splitlines() if line.startswith("| [")]
    assert len(rows) == 1
    assert "[dice](https://arxiv.org/abs/0000.00000)" in rows[0]
    assert "yes: every seed counts: 0 1 >= 0" in rows[0]
    assert "NO: six is more than seven: 6 >= 7" in rows[0]
    assert re.search(r"\| \d{4}-\d\d-\d\d \| .+ cores", rows[0])


def test_claims_of_some_methods_leave_the_other_rows(dice, tmp_path, monkeypatch, capsys):
    other = Method("coin", "Coin", "1111.11111", "language", "game", ("divergence",), ("toss",))
    monkeypatch.setattr(runner, "METHODS", {"coin": other, "dice": dice})
    monkeypatch.setitem(METHODS, "coin", other)
    document = tmp_path / "claims.md"
    runner.claims(2, document=document, directory=tmp_path / "runs")
    assert "==> dice (2 of 2, 0:00 left)" in capsys.readouterr().out
    before = [line for line in document.read_text().splitlines() if line.startswith("| [")]
    assert [line[3:7] for line in before] == ["coin", "dice"]
    runner.claims(1, start_with="dice", document=document, directory=tmp_path / "runs")
    after = [line for line in document.read_text().splitlines() if line.startswith("| [")]
    assert before[0].split() == after[0].split()
    assert [line.split(" | ")[2].strip() for line in after] == ["2", "1"]

    # What fails does not take along what was measured before it.
    def broken(report, seeds, budget):
        raise RuntimeError("out of dice")

    monkeypatch.setattr(
        Method, "load_recipe", lambda self: ModuleType(self.id) if self is other else fails
    )
    fails = ModuleType("fails")
    fails.run = broken
    with pytest.raises(RuntimeError, match="out of dice"):
        runner.claims(1, start_with="dice", document=document, directory=tmp_path / "runs")
    assert document.read_text().count("| [") == 2
    with pytest.raises(ValueError, match="no method 'poker'"):
        runner.claims(start_with="poker", document=document)


def test_by_default_as_many_seeds_as_fit_into_two_minutes(dice, tmp_path, monkeypatch):
    given = []
    recipe = dice.load_recipe()
    monkeypatch.setattr(recipe, "run", lambda report, seeds, budget: given.append((seeds, budget)))
    runner.run("dice", directory=tmp_path)
    runner.run("dice", 5, directory=tmp_path)
    assert given == [(range(3), 120.0), (range(5), math.inf)]


def test_no_seeds_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="at least one seed, got 0"):
        runner.run("taid", 0, directory=tmp_path)
