"""The `stillhouse` command itself: its subcommands, its exit codes, one line an error."""

import subprocess
import sys

import pytest

from stillhouse import cli


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["stillhouse", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse", "methods"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "taid" in done.stdout


def test_help_names_the_subcommands(monkeypatch, capsys):
    assert call(monkeypatch, "--help") == 0
    output = capsys.readouterr().out
    assert all(name in output for name in ("distill", "methods", "run"))


def test_one_method(monkeypatch, capsys):
    assert call(monkeypatch, "methods", "taid") == 0
    assert "arxiv.org/abs/2501.16937" in capsys.readouterr().out


def test_distill_has_its_own_help(monkeypatch, capsys):
    assert call(monkeypatch, "distill", "--help") == 0
    assert "--method_options" in capsys.readouterr().out


def test_run_hands_on(monkeypatch):
    from stillhouse.recipes import runner

    seen = []
    monkeypatch.setattr(runner, "run", lambda id, seeds: seen.append((id, seeds)))
    monkeypatch.setattr(runner, "claims", lambda seeds, **options: seen.append((options, seeds)))
    assert call(monkeypatch, "run", "taid", "--seeds", "2") == 0
    assert call(monkeypatch, "run", "--all", "--start-with", "mgsr") == 0
    assert seen == [("taid", 2), ({"start_with": "mgsr"}, None)]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["methods", "telepathy"], 1, "no method 'telepathy'"),
        (["run"], 2, "name one method, or pass --all"),
        (["run", "taid", "--all"], 2, "name one method, or pass --all"),
        (["run", "taid", "--start-with", "mgsr"], 2, "--start-with is of --all"),
        (["methods", "--domain", "telepathy"], 1, "no domain 'telepathy'"),
        (["run", "taid", "--seeds", "x"], 2, "--seeds"),
        (["distill", "--data", "a"], 2, "--student is missing"),
        (["distill", "stray", "--data", "a", "--student", "b"], 2, "unknown argument stray"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, words, status, message):
    assert call(monkeypatch, *words) == status
    error = capsys.readouterr().err.strip()
    assert error.startswith("stillhouse: error: ")
    assert message in error
    assert len(error.splitlines()) == 1
