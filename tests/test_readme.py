"""README.md says what is so: its Python runs, its table lists every kind, its commands exist."""

import re
from pathlib import Path

import pytest

from stillhouse import ops

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.S | re.M)


def test_python_blocks_run_one_after_another(capsys):
    names: dict[str, object] = {}
    assert len(blocks("python")) >= 2
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["student_logits"].grad.abs().sum() > 0
    # With inplace_grad the logits have become their own gradient: rows of it sum to zero.
    assert names["logits"].detach().sum(-1).abs().max() < 1e-5
    assert re.search(r"accepted \d+% of the time", capsys.readouterr().out)


def test_the_table_lists_every_kind_with_its_defaults():
    rows = re.findall(r"^\| `(\w+)` \| `ops\.(.+?)` \|", README, re.M)
    assert {name for name, _ in rows} == set(ops.KINDS)
    for name, call in rows:
        kind = eval(f"ops.{call}", {"ops": ops, "t": 0.5})
        assert type(kind) is ops.KINDS[name]
        if name != "taid":
            assert kind == ops.as_kind(name)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", "\n".join(blocks("sh")) + README):
        assert re.search(rf"^{target}:", makefile, re.M), f"README.md names make {target}"


def test_subcommands_exist():
    pytest.importorskip("typer", reason="the command line is an extra")
    import typer

    from stillhouse.cli import app

    known = set(typer.main.get_command(app).commands)
    named = set(re.findall(r"^stillhouse (\w+)", "\n".join(blocks("sh")), re.M))
    assert named, "README.md shows no subcommand"
    assert named <= known


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_files_named_in_extending_exist():
    section = README.split("## Extending")[1].split("\n## ")[0]
    named = re.findall(r"`((?:csrc|python|methods|recipes|tests|bench)/[\w/.<>]*)`", section)
    assert named
    for path in named:
        path = path.split("<")[0]
        found = [root / path for root in (ROOT, ROOT / "python/stillhouse")]
        assert any(each.exists() for each in found), path
