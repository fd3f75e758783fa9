"""`stillhouse speculate` on a tiny Llama: what it leaves, what it refuses."""

import json

import pytest

from stillhouse import cli
from stillhouse.errors import UsageError
from stillhouse.recipes import speculate_job
from stillhouse.recipes.speculate import SpeculateArguments, speculate

PLAIN, ALONE = "none: generate()", "none: ours"
KINDS = ["repetitive", "code", "prose"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, llama, make_tokenizer):
    """A folder with a model, a smaller one and text."""
    folder = tmp_path_factory.mktemp("speculate")
    for name, layers in (("target", 2), ("draft", 1)):
        llama(layers=layers).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    (folder / "text").mkdir()
    for number in range(3):
        (folder / "text" / f"{number}.txt").write_text(f"{number} words of a text " * 20)
    return folder


@pytest.fixture
def run(place, tmp_path):
    """run(**arguments): the report of the command, in tmp_path/run."""

    def call(**arguments):
        given = {
            "target": str(place / "target"),
            "corpus": str(place / "text"),
            "out": str(tmp_path / "run"),
            "max_new_tokens": 10,
            "prompt_tokens": 12,
            "repeats": 2,
        }
        return speculate(SpeculateArguments(**given | arguments))

    return call


def test_it_leaves_a_table_and_plots(run, place, tmp_path, capsys):
    report = run(draft=str(place / "draft"), drafter="aded,ngram", prompts=str(place / "text"))
    rows = report.tables["speed"]
    names = [PLAIN, ALONE, f"model {place.name}", "aded", "ngram"]
    kinds = [*KINDS, "given"]
    assert [(row["text"], row["drafter"]) for row in rows] == [
        (kind, name) for kind in kinds for name in names
    ]
    for row in rows:
        assert row["tokens/s"] > 0
        assert row["times plain"] == pytest.approx(
            row["tokens/s"] / report.values["tokens_per_second"][row["text"]][PLAIN]
        )
        assert row["same text"] == ("–" if row["drafter"] == PLAIN else "yes")
        assert (row["tokens a forward"] == 1.0) >= (row["drafter"] in (PLAIN, ALONE))
    saved = json.loads((tmp_path / "run" / "report.json").read_text())
    assert saved["configuration"]["max_new_tokens"] == 10
    assert [len(each) for each in saved["continued"].values()] == [2, 2, 2, 3]
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert files == ["accepted.png", "report.json", "written.png"]
    for x, y in report.curves["accepted"]["series"].values():
        assert len(x) == len(y)
        assert sum(y) == pytest.approx(1)
    for seconds, tokens in report.curves["written"]["series"].values():
        assert seconds == sorted(seconds)
        assert tokens[0] == 0
        assert tokens[-1] == 10
    assert "| repetitive |" in capsys.readouterr().out


def test_sampled_text_is_not_compared(run):
    report = run(drafter="ngram", temperature=0.8, top_p=0.9, repeats=1)
    assert {row["same text"] for row in report.tables["speed"]} == {"–"}


def test_a_text_does_not_teach_the_next_round(run, monkeypatch):
    asked = []
    load = speculate_job.TrigramTable.load
    monkeypatch.setattr(
        speculate_job.TrigramTable, "load", lambda path: asked.append(path) or load(path)
    )
    run(drafter="aded", repeats=1)
    assert len(asked) == 2 * 6  # each prompt in each of two rounds


def test_what_is_refused(run, place, tmp_path):
    for arguments, words in (
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        ({"repeats": 0}, "--repeats must be at least 1"),
        ({"drafter": "aded,oracle"}, "--drafter must be one of aded, ngram, fspad, got 'oracle'"),
        ({"drafter": "fspad"}, "--head"),
        ({"drafter": "ngram", "head": "here"}, "--head"),
        ({"dtype": "int8"}, "--dtype must be one of"),
        ({"temperature": -0.5}, "--temperature must be"),
        ({"top_p": 2.0}, "--top-p must be"),
        ({"max_nodes": 2000}, "--max-nodes must be below 1024"),
        ({"mode": "best"}, "--mode must be one of auto, greedy"),
        ({"mode": "traversal"}, "--mode traversal needs a --temperature above 0"),
        ({"drafter": ""}, "--drafter must be one of .* got ''"),
        ({"out": str(place / "text" / "0.txt")}, "is a file"),
    ):
        with pytest.raises(UsageError, match=words):
            run(**arguments)
    assert not (tmp_path / "run").exists()


def test_models_that_do_not_fit(run, tmp_path, llama, make_tokenizer):
    other = make_tokenizer()
    other.add_tokens(["kiln"])
    llama(vocab_size=260).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="--draft has 260 tokens and --target 259"):
        run(draft=str(tmp_path / "other"))


def test_at_the_command_line(place, tmp_path, capsys, monkeypatch):
    command = ["stillhouse", "speculate", "--target", str(place / "target"), "--drafter", "ngram"]
    command += ["--max-new-tokens", "4", "--prompt_tokens", "8", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(tmp_path / "cli")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert (tmp_path / "cli" / "report.json").is_file()
    monkeypatch.setattr("sys.argv", [*command, "--top-p", "3"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "--top-p must be in (0, 1], got 3.0" in capsys.readouterr().err
