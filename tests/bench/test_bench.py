"""The benchmark driver on a tiny shape, and its two measurements on calls whose cost is known."""

import csv
import time
from functools import partial

import pytest
import torch
from stillhouse.bench import divergence, kinds, linear, machine, measure, sparse
from stillhouse.bench.driver import COLUMNS
from stillhouse.bench.grid import Cell

from stillhouse import bench, ops

TINY = [
    "--family",
    "divergence",
    "--shape",
    "4x64",
    "--kind",
    "jsd",
    "--dtype",
    "fp32",
    "--rounds",
    "2",
]


def rows(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_for_each_provider_and_the_floor(tmp_path, capsys):
    path = tmp_path / "results.csv"
    arguments = [*TINY, "--no-memory", "--csv", str(path)]
    for provider in ("stillhouse", "eager", "liger"):
        arguments += ["--provider", provider]
    assert bench.main(arguments) == 0
    found = {(row["form"], row["provider"]): row for row in rows(path)}
    providers = ("stillhouse", "eager", "liger", "floor")
    assert set(found) == {(form, p) for form in ("row", "loss") for p in providers}
    for (_, provider), row in found.items():
        assert tuple(row) == COLUMNS
        assert all(row[name] for name in ("machine", "cpu", "threads", "torch", "date"))
        if provider == "liger":
            assert row["median_ms"] == ""
            assert "GPU" in row["note"]
        else:
            assert float(row["median_ms"]) > 0
            assert row["rounds"] == "2"
    output = capsys.readouterr()
    assert "x floor" in output.out
    assert "not run: its Triton kernels need a GPU" in output.out
    assert "[2/2]" in output.err


def test_a_second_measurement_replaces_the_first(tmp_path):
    path = tmp_path / "results.csv"
    arguments = [*TINY, "--form", "row", "--provider", "eager", "--no-memory", "--csv", str(path)]
    bench.main(arguments)
    bench.main([*arguments, "--rounds", "3"])
    assert [row["rounds"] for row in rows(path)] == ["3", "3"]


def test_a_row_names_the_device_that_it_was_measured_on(tmp_path, monkeypatch):
    described = machine.describe("cpu")
    monkeypatch.setattr(machine, "describe", lambda device="?": described | {"level": device})
    path = tmp_path / "results.csv"
    bench.main([*TINY, "--form", "row", "--provider", "eager", "--no-memory", "--csv", str(path)])
    assert {row["level"] for row in rows(path)} == {"cpu"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shape", "512"], "--shape wants two positive numbers"),
        (["--shape", "0x7"], "--shape wants two positive numbers"),
        (["--kind", "kl"], "--kind kl: not one of AdaptiveKL(), AlphaBeta()"),
        (["--provider", "nobody"], "--provider nobody: not one of"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--roun", "3"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_csv_of_another_layout_is_refused_before_anything_runs(tmp_path, capsys):
    path = tmp_path / "results.csv"
    path.write_text("op,time\nx,1\n")
    with pytest.raises(SystemExit):
        bench.main([*TINY, "--csv", str(path)])
    assert "has other columns" in capsys.readouterr().err
    assert path.read_text() == "op,time\nx,1\n"


@pytest.mark.parametrize("form", divergence.FORMS)
@pytest.mark.parametrize("kind", divergence.KINDS)
def test_all_providers_compute_the_same_gradient(kind, form):
    cell = Cell(divergence.NAME, kind, form, "fp32", rows=6, columns=101)
    found = {}
    for provider in divergence.PROVIDERS:
        if provider.refuses(cell) is None:
            student, teacher = divergence.make_logits(cell, "cpu")
            _, (gradient,) = divergence.Step(provider, cell, "cpu")(student, teacher)
            found[provider.name] = gradient
            in_place = provider.in_place and form == "loss"
            assert (gradient.data_ptr() == student.data_ptr()) == in_place
    assert {"stillhouse", "eager", "torch.compile"} <= set(found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, found["eager"], atol=2e-6, rtol=1e-4, msg=name)


def test_every_kind_is_measured():
    measured = {kind.split("(")[0] for kind in kinds.PLAIN} | {"ForwardKL"}
    measured |= {kind.split("(")[0] for kind, _ in sparse.KINDS}
    assert measured == {kind.__name__ for kind in ops.KINDS.values()}


@pytest.mark.parametrize("form", divergence.FORMS)
@pytest.mark.parametrize("kind", kinds.PLAIN)
def test_the_eager_form_of_every_kind_computes_the_same_gradient(kind, form):
    cell = Cell(kinds.NAME, kind, form, "fp32", rows=6, columns=101)
    found = []
    for provider in (kinds.PROVIDERS[0], kinds.PROVIDERS[-1]):
        student, teacher = divergence.make_logits(cell, "cpu")
        _, (gradient,) = divergence.Step(provider, cell, "cpu")(student, teacher)
        found.append(gradient)
    torch.testing.assert_close(*found, atol=5e-6, rtol=1e-3)


@pytest.mark.parametrize("form", divergence.FORMS)
@pytest.mark.parametrize("kind", [" ".join(pair) for pair in sparse.KINDS])
def test_the_eager_form_of_every_sparse_kind_computes_the_same_gradient(kind, form):
    cell = Cell(sparse.NAME, kind, form, "fp32", rows=6, columns=301)
    found = []
    for provider in (sparse.PROVIDERS[0], sparse.PROVIDERS[-1]):
        student, teacher = divergence.make_logits(cell, "cpu")
        _, (gradient,) = divergence.Step(provider, cell, "cpu")(student, teacher)
        found.append(gradient)
    torch.testing.assert_close(*found, atol=5e-6, rtol=1e-3)


@pytest.mark.parametrize("form", linear.FORMS)
@pytest.mark.parametrize("kind", linear.KINDS)
def test_all_linear_providers_compute_the_same_gradients(kind, form):
    cell = Cell(linear.NAME, kind, form, "fp32", rows=6, columns=101)
    found = {}
    for provider in linear.PROVIDERS:
        inputs, step = linear.Inputs(cell, "cpu"), linear.Step(provider, cell, "cpu")
        step.function(inputs).backward(step.upstream)
        found[provider.name] = [leaf.grad for leaf in inputs.leaves]
    assert len(found["stillhouse"]) == (1 if "frozen" in form else 2)
    for name, gradients in found.items():
        torch.testing.assert_close(gradients, found["eager"], atol=2e-6, rtol=1e-4, msg=name)


def test_the_memory_of_a_kind_is_probed():
    cell = Cell(kinds.NAME, "DKD()", "loss", "fp32", rows=6, columns=101)
    call, fresh = kinds.memory_call(cell, "stillhouse", 1, "cpu")
    call()
    assert fresh == 0  # in place


def test_rounds_are_interleaved_and_stop_at_the_limit():
    order = []

    def call(name: str, number: int) -> float:
        order.append(name)
        time.sleep(0.02)
        return float(number)

    names = "abc"
    runners = {name: partial(call, name) for name in names}
    times = measure.interleaved(runners, rounds=100, seconds=0.01, warm_up=1)
    assert {len(values) for values in times.values()} == {measure.FEWEST_ROUNDS}
    for begin in range(0, len(order), len(names)):
        assert set(order[begin : begin + len(names)]) == set(names)
    # Each call has a number of its own, by which buffers rotate.
    numbers = [number for values in times.values() for number in values]
    assert len(set(numbers)) == len(numbers)


def scratch_of(mib: int):
    """For `peak_memory`: a call that touches `mib` MiB beside a gradient of 8 MiB."""

    def call() -> torch.Tensor:
        gradient = torch.ones(8 * 2**18)
        torch.ones(mib * 2**18)
        return gradient

    call()
    return call, 8 * 2**20


@pytest.mark.parametrize("mib", [1, 5, 64])
def test_peak_memory_is_what_was_touched_beyond_the_gradient(mib):
    assert measure.peak_memory(scratch_of, mib) / 2**20 == pytest.approx(mib, abs=0.5)


def fails():
    raise SystemExit(3)


def test_a_probe_that_dies_is_reported():
    with pytest.raises(RuntimeError, match="exit code 3"):
        measure.peak_memory(fails)
