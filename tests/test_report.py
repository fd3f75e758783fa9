"""The report: what a claim means, what lands on disk, what is printed."""

import json
import math
import os
import sys

import pytest
import torch

from stillhouse import report as report_module
from stillhouse.report import Report, machine, markdown_table, versions


@pytest.fixture
def report(tmp_path):
    return Report("trial", tmp_path / "runs" / "trial")


def saved(report):
    return json.loads(report.save().read_text())


@pytest.mark.parametrize(
    ("measured", "reference", "margin", "relation", "holds"),
    [
        (0.5, 0.4, 0.1, ">=", True),
        (0.5, 0.4, 0.11, ">=", False),
        (0.5, 0.6, 0.0, "<=", True),
        (1.04, 1.0, 0.03, "<=", False),
        ([0.5, 0.6, 0.7], 0.5, 0.0, ">=", True),
        ([0.5, 0.6, 0.4], 0.5, 0.0, ">=", False),
        (torch.tensor([0.5, 0.6, 0.7]), [0.5, 0.6, 0.7], -0.001, ">=", True),
        ([0.5, math.nan, 0.7], 0.1, 0.0, ">=", False),
        (0.5, math.nan, 0.0, ">=", False),
    ],
)
def test_a_claim_holds_when_every_seed_reaches_the_bound(
    report, measured, reference, margin, relation, holds
):
    seeds = range(3)
    assert report.claim("it wins", measured, reference, margin, seeds, relation=relation) is holds
    assert saved(report)["claims"][0]["holds"] is holds


def test_a_claim_of_another_form_is_judged_by_the_caller(report):
    assert report.claim("three in a row", 1.0, 2.0, holds=True) is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(measured=[1.0, 2.0], reference=1.0, seeds=range(3)), "3 seeds"),
        (dict(measured=1.0, reference=1.0, seeds=[]), "at least 1"),
        (dict(measured=1.0, reference=1.0, relation=">"), "'>='"),
    ],
)
def test_a_malformed_claim_raises(report, arguments, message):
    with pytest.raises(ValueError, match=message):
        report.claim("it wins", **arguments)


def test_json_has_values_tables_claims_and_where_it_was_measured(report):
    report.value("perplexity", {"teacher": torch.tensor(20.5), "student": math.inf})
    report.table("result", [{"method": "taid", "score": 1.5}])
    report.claim("it wins", [1.0, 2.0], 0.5, 0.25, [3, 4])
    content = saved(report)
    assert content["perplexity"] == {"teacher": 20.5, "student": None}
    assert content["tables"] == {"result": [{"method": "taid", "score": 1.5}]}
    assert content["claims"] == [
        {
            "statement": "it wins",
            "measured": [1.0, 2.0],
            "relation": ">=",
            "reference": 0.5,
            "margin": 0.25,
            "seeds": [3, 4],
            "holds": True,
        }
    ]
    assert content["machine"] == machine()
    assert content["versions"]["torch"] == torch.__version__
    assert len(content["date"]) == len("2025-12-31")


def test_a_value_cannot_replace_what_the_report_writes(report):
    with pytest.raises(ValueError, match="'versions'"):
        report.value("versions", {})


def test_each_curve_becomes_a_picture(report):
    report.curve("loss", range(3), {"a": [3.0, 2.0, 1.0], "b": [1.0, math.nan, 3.0]})
    report.curve("plane", {"a": [1.0]}, {"a": [2.0]}, points=True)
    content = saved(report)
    for name in ("loss", "plane"):
        assert (report.directory / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert content["curves"]["loss"]["series"]["b"] == [[0, 1, 2], [1.0, None, 3.0]]
    assert sorted(os.listdir(report.directory)) == ["loss.png", "plane.png", "report.json"]


def test_a_picture_shows_columns_side_by_side(report):
    matplotlib = pytest.importorskip("matplotlib")
    columns = torch.zeros(30, 4)
    columns[20:, 0] = 5.0  # from two thirds on, the lowest row
    columns[0, 3] = math.nan
    report.picture("seen", {"above": columns, "below": columns + 1}, xlabel="s", xstep=0.02)
    assert saved(report)["pictures"] == {"seen": ["above", "below"]}
    path = report.directory / "seen.png"
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert not list(report.directory.glob("*.partial"))
    pixels = matplotlib.image.imread(path)[..., :3]

    def where(value):
        colour = matplotlib.colormaps["viridis"](value / 6)[:3]  # of 0 to 6, in both panels
        rows, columns = (abs(pixels[:, :900] / colour - 1).max(-1) < 0.03).nonzero()[:2]
        return rows / len(pixels), columns / pixels.shape[1]

    for value, low, high in ((5, 0.2, 0.5), (1, 0.5, 0.95)):
        rows, columns = where(value)
        assert low < rows.min() < rows.max() < high, value
    assert where(5)[1].min() > 0.4


def test_a_malformed_picture_raises(report):
    for panels, message in (
        ({"a": []}, "columns of one height, at least one"),
        ({"a": [[1.0], [1.0, 2.0]]}, "one height"),
        ({"a": [1.0, 2.0]}, "one height"),
        ({"a": [[math.nan]]}, "no value is finite"),
    ):
        with pytest.raises(ValueError, match=message):
            report.picture("seen", panels)
    with pytest.raises(ValueError, match="a picture's name becomes a file name"):
        report.picture("../seen", {"a": [[1.0]]})


def test_a_malformed_curve_raises(report):
    with pytest.raises(ValueError, match="2 x values, 3 y values"):
        report.curve("loss", [1, 2], {"a": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="file name"):
        report.curve("../loss", [1], {"a": [1.0]})


def test_without_matplotlib_the_numbers_are_kept_and_it_says_so(report, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report.curve("loss", [1], {"a": [1.0]})
    assert saved(report)["curves"]["loss"]["series"]["a"] == [[1], [1.0]]
    assert "stillhouse[plots]" in capsys.readouterr().out


def test_an_interrupted_save_leaves_the_old_report(report, monkeypatch):
    report.value("score", 1)
    before = report.save().read_text()

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(report_module.os, "replace", fail)
    report.value("score", 2)
    with pytest.raises(OSError, match="disk full"):
        report.save()
    assert (report.directory / "report.json").read_text() == before


def test_saving_prints_tables_and_claims(report, capsys):
    report.table("result", [{"method": "taid", "score": 0.123456}])
    report.claim("it wins", [0.5, 0.25], 0.75, -0.5, range(2))
    report.claim("it is fast", 3.0, 2.0, relation="<=")
    report.save()
    printed = capsys.readouterr().out
    assert "| taid   | 0.1235 |" in printed
    assert "| it wins    | 0.5 0.25 | >= 0.75 − 0.5 | 2     | yes   |" in printed
    assert "| it is fast | 3        | <= 2          | 1     | NO    |" in printed


def test_markdown_cells_cannot_break_the_table():
    table = markdown_table([{"a": "x|y", "b": None}, {"a": [0.5, 2.0]}])
    assert table.splitlines() == [
        "| a     | b |",
        "|-------|---|",
        "| x\\|y  | – |",
        "| 0.5 2 |   |",
    ]
    assert markdown_table([]) == "(no rows)"


def test_seeds_stop_where_the_budget_would_be_overrun(report, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(report_module.time, "monotonic", lambda: clock[0])
    report.started = 0.0

    def seeds_done(budget):
        clock[0], done = 0.0, []
        for seed in report.within(budget, range(5)):
            clock[0] += 10.0
            done.append(seed)
        return done

    assert seeds_done(math.inf) == [0, 1, 2, 3, 4]
    assert seeds_done(35.0) == [0, 1, 2]
    assert seeds_done(30.0) == [0, 1, 2]
    assert seeds_done(0.0) == [0]


def test_versions_name_what_is_loaded():
    assert {"python", "stillhouse", "torch"} <= set(versions())
