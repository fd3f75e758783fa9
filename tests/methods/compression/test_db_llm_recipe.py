"""The recipe in a few steps, on real descriptions of packages."""

import math

import pytest

from stillhouse import data
from stillhouse.recipes.compression import db_llm as recipe
from stillhouse.recipes.language import package_lm
from stillhouse.report import Report


def test_recipe_in_a_few_steps(tmp_path, monkeypatch):
    try:
        data.debian_packages()
    except data.DataUnavailable as error:
        pytest.skip(str(error))
    monkeypatch.setattr(package_lm, "STEPS", 4)
    monkeypatch.setattr(recipe, "STEPS", 3)
    monkeypatch.setattr(recipe, "HELD", 16)
    monkeypatch.setattr(recipe, "NORMAL", 64)
    report = Report("db-llm", tmp_path)
    recipe.run(report, range(2), budget=math.inf)
    report.save()
    assert report.seeds == [0, 1]
    assert len(report.claims) == 6
    assert len(report.tables["held-out text"]) == 8
    assert report.values["bytes"]["after"] < report.values["bytes"]["before"]
    assert set(report.values["DAD - KD, perplexity"]) == {"mean", "error"}
    by_entropy = report.tables["KL to the teacher in quarters of its entropy"]
    assert all(row[name] > 0 for row in by_entropy for name in recipe.QUARTERS)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"loss"}
