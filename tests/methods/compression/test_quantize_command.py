"""`stillhouse quantize` on a tiny Llama: what it leaves, what it goes on with, what it refuses."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stillhouse import cli
from stillhouse.errors import UsageError
from stillhouse.methods.compression import EntropyWeightedLoss, account, load_fdb
from stillhouse.nn import FDBLinear
from stillhouse.recipes import generation_speed, quantize_job
from stillhouse.recipes.quantize import QuantizeArguments, quantize
from stillhouse.train.examples import Example

NAMES = [
    "original",
    "round to nearest",
    "least squares",
    "least squares, KD",
    "least squares, DAD",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, llama, make_tokenizer):
    """A folder with a model and text."""
    folder = tmp_path_factory.mktemp("quantize")
    llama().save_pretrained(folder / "dense")
    make_tokenizer().save_pretrained(folder / "dense")
    (folder / "text").mkdir()
    for number in range(6):
        (folder / "text" / f"{number}.txt").write_text(f"{number} words of a text " * 20)
    return folder


@pytest.fixture
def run(place, tmp_path, monkeypatch):
    """run(**arguments): the report of the command, in tmp_path/run."""
    monkeypatch.setattr(generation_speed, "REPEATS", 2)
    monkeypatch.setattr(generation_speed, "MOST", 4)

    def call(**arguments):
        given = {
            "model": str(place / "dense"),
            "data": str(place / "text"),
            "out": str(tmp_path / "run"),
            "group_size": 16,
            "steps": 12,
            "max_length": 32,
            "eval_share": 0.2,
        }
        return quantize(QuantizeArguments(**given | arguments))

    return call


def by_name(report, column):
    return {row["weights"]: row[column] for row in report.tables["held-out text"]}


def weights(folder):
    return load_file(folder / "run" / "model" / "model.safetensors")


def test_it_leaves_a_table_plots_and_the_best_model(run, tmp_path, capsys):
    report = run()
    folder, perplexity = tmp_path / "run", by_name(report, "perplexity")
    assert list(perplexity) == NAMES
    divergence = by_name(report, "KL to the original")
    assert divergence["least squares, KD"] < divergence["least squares"]
    assert divergence["least squares, DAD"] < divergence["least squares"]
    best = min(NAMES[1:], key=perplexity.get)
    assert report.values["best"] == best
    assert by_name(report, "bits of a linear weight") == dict.fromkeys(NAMES, 4.0) | {
        "original": 16.0
    }
    assert by_name(report, "bits of any weight")["original"] == 16.0
    assert all(rate > 0 for rate in by_name(report, "tokens/s").values())
    assert by_name(report, "KL to the original")["original"] == pytest.approx(0, abs=1e-5)
    saved = json.loads((folder / "report.json").read_text())
    assert saved["tables"]["held-out text"][0]["weights"] == "original"
    assert sorted(path.name for path in folder.iterdir()) == [
        "acceptance.png",
        "error.png",
        "loss.png",
        "model",
        "report.json",
    ]
    curve = report.curves["acceptance"]["series"]
    assert all(y[-1] > y[0] for _, y in curve.values())
    # The model on disk is the one of the table.
    model = load_fdb(folder / "model")
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, FDBLinear)
    assert layer.frozen
    assert model.lm_head.weight.dtype == torch.bfloat16
    megabytes = by_name(report, "MB")[best]
    assert account(model).bytes / 1e6 == megabytes
    header = 16_000  # of a safetensors file with 80 entries
    assert megabytes * 1e6 < report.values["bytes_on_disk"] < megabytes * 1e6 + header
    output = capsys.readouterr().out
    assert f"load it: {report.values['load']}" in output
    assert "| least squares, DAD" in output


def test_without_steps_nothing_is_distilled(run, tmp_path):
    report = run(steps=0)
    assert list(by_name(report, "perplexity")) == NAMES[:3]
    assert list(report.curves) == ["error"]
    (_, rounded), (_, fitted) = report.curves["error"]["series"].values()
    assert len(fitted) == 14
    assert all(0 < a < b for a, b in zip(fitted, rounded, strict=True))
    assert (tmp_path / "run" / "error.png").is_file()
    assert load_fdb(tmp_path / "run" / "model").config.model_type == "llama"


def stopped(self, *arguments):
    raise KeyboardInterrupt


def test_a_run_that_was_stopped_goes_on_and_is_the_run(run, tmp_path, monkeypatch, capsys):
    whole = run(out=str(tmp_path / "whole"))
    calls, own = [], EntropyWeightedLoss.__call__

    def until_the_eighth(self, *arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return own(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(EntropyWeightedLoss, "__call__", until_the_eighth)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(UsageError, match="holds a run that was stopped: continue with --resume"):
        run()
    with pytest.raises(UsageError, match="was begun with --steps 12, not 13"):
        run(steps=13, resume=True)
    made, measured = [], quantize_job.fidelity
    monkeypatch.setattr(quantize_job, "fidelity", lambda *given: made.append(1) or measured(*given))
    taught = []
    monkeypatch.setattr(
        EntropyWeightedLoss, "__call__", lambda *given: taught.append(1) or own(*given)
    )
    again = run(resume=True)
    assert len(taught) == 7  # of 12, from the fifth on
    assert len(made) == 1
    assert by_name(again, "perplexity") == by_name(whole, "perplexity")
    assert again.curves["loss"] == whole.curves["loss"]
    mine, theirs = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole")
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(UsageError, match="is finished: there is nothing to --resume"):
        run(resume=True)


def test_checkpoints_hold_scales_alone(run, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize_job.Job, "best", property(stopped))
    with pytest.raises(KeyboardInterrupt):
        run(steps=6)
    unfinished = tmp_path / "run" / "unfinished"
    names = sorted(path.name for path in unfinished.iterdir())
    assert names == ["dad.pt", "kd.pt", "measured.json", "settings.json"]
    state = torch.load(unfinished / "kd.pt", weights_only=True)["model"]
    scales = 2 * 2 * (192 * 2 + 32 * 3)  # of two blocks: rows of two and of three groups
    assert sum(each.numel() for name, each in state.items() if "change" in name) == scales
    assert sum(each.numel() for each in state.values()) == 2 * scales


def test_overwriting(run, tmp_path):
    run(steps=0)
    first = weights(tmp_path)
    with pytest.raises(UsageError, match="already holds model: --overwrite starts again"):
        run(steps=0, group_size=8)
    assert torch.equal(weights(tmp_path)["lm_head.weight"], first["lm_head.weight"])
    report = run(steps=0, group_size=8, overwrite=True)
    assert by_name(report, "bits of a linear weight")["least squares"] == 6.0
    assert load_fdb(tmp_path / "run" / "model").model.layers[0].mlp.up_proj.group_size == 8


def test_some_blocks_of_a_model(run, place, tmp_path):
    run(model=f"layers:1@{place / 'dense'}", steps=0)
    assert len(load_fdb(tmp_path / "run" / "model").model.layers) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "--steps must be at least 0, got -1"),
        ({"group_size": 0}, "--group-size must be at least 1"),
        (
            {"group_size": 12},
            "--group-size 12 does not divide the 32 columns of .*q_proj: take a divisor of 16",
        ),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"learning_rate": float("nan")}, "--learning-rate must be positive"),
        ({"eval_share": 0.0}, "--eval-share must be between 0 and 1"),
        ({"model": "fdb:16@x"}, "--model fdb:16@x: name the dense model"),
        ({"model": "layers:0"}, "--model layers:0: name whose layers, layers:0@MODEL"),
        ({"model": "./nowhere"}, "no model at ./nowhere"),
        ({"data": "./nowhere"}, "no data at nowhere"),
        ({"max_length": 4096}, "--max_length 4096: longer than the 128 positions"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(run, tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        run(**arguments)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_folders_of_others(run, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UsageError, match="is a file: name a folder"):
        run()
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("of mine")
    with pytest.raises(UsageError, match="already holds a.txt: --overwrite starts again"):
        run(out=str(notes))
    other = tmp_path / "other"
    (other / "model").mkdir(parents=True)
    (other / "model" / "notes.txt").write_text("of mine")
    with pytest.raises(UsageError, match="is no model and would be replaced"):
        run(out=str(other), overwrite=True)
    assert (other / "model" / "notes.txt").read_text() == "of mine"


def test_a_model_that_has_two_bits(run, tmp_path):
    run(steps=0)
    with pytest.raises(UsageError, match="has two-bit layers or experts already"):
        run(model=str(tmp_path / "run" / "model"), out=str(tmp_path / "again"))


def test_at_the_command_line(place, tmp_path, monkeypatch, capsys):
    words = ["quantize", "--model", str(place / "dense"), "--data", str(place / "text")]
    words += ["--group_size", "16", "--max-length", "32", "--out", str(tmp_path / "run")]
    seen = []

    def call(*more):
        monkeypatch.setattr(sys, "argv", ["stillhouse", *words, *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        seen[:] = capsys.readouterr()
        return stop.value.code

    assert call("--steps", "-1") == 2
    assert seen[1] == "stillhouse: error: --steps must be at least 0, got -1\n"
    assert call("--help") == 0
    assert "--group-size" in seen[0]
    monkeypatch.setattr(generation_speed, "REPEATS", 1)
    monkeypatch.setattr(generation_speed, "MOST", 2)
    assert call("--steps", "0") == 0
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()


def test_the_rate_rises_and_falls_wherever_it_goes_on():
    def rates(optimizer, parameter, count):
        for _ in range(count):
            parameter.grad = torch.ones(3)
            optimizer.step()
            yield optimizer.param_groups[0]["lr"]

    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = quantize_job._optimizer([parameter], 1.0, 20)
    first = list(rates(optimizer, parameter, 7))
    expected = [0.5] + [1 - step / 20 for step in range(1, 20)]
    assert first == pytest.approx(expected[:7])
    again = quantize_job._optimizer([parameter], 1.0, 20)
    again.load_state_dict(optimizer.state_dict())
    assert list(rates(again, parameter, 13)) == pytest.approx(expected[7:])


def test_each_example_once_and_then_in_another_order():
    def order(seed):
        job = SimpleNamespace(
            arguments=SimpleNamespace(batch_size=3, seed=seed),
            examples=[Example(np.full(2, n, np.int32), np.ones(2, bool), n) for n in range(12)],
            _on_device=lambda batch: batch,
        )
        steps = (quantize_job.Job._batch(job, step)["record"] for step in range(8))
        return torch.cat(list(steps)).tolist()

    found = order(0)
    first, second = found[:12], found[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert order(0) == found
    assert order(1) != found
