"""From a teacher to shards and from shards to a student, on a tiny model."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from stillhouse.errors import UsageError
from stillhouse.recipes import distill as distillation
from stillhouse.recipes.capture import CaptureArguments, capture
from stillhouse.teachers import ShardError, TeacherShards
from stillhouse.train.arguments import parse


@pytest.fixture
def world(tmp_path, llama, tokenizer):
    """A folder with a teacher, a student of its own, and two texts."""
    llama(3, seed=1).save_pretrained(tmp_path / "teacher")
    llama(1).save_pretrained(tmp_path / "student")
    for name in ("teacher", "student"):
        tokenizer.save_pretrained(tmp_path / name)
    words = random.Random(1)
    for name, count in (("text", 12), ("other", 12)):
        (tmp_path / name).mkdir()
        for number in range(count):
            text = "".join(words.choices("abcdefgh ", k=300))
            (tmp_path / name / f"{number}.txt").write_text(text)
    return tmp_path


def arguments(world, **changes):
    options = dict(
        teacher=str(world / "teacher"),
        data=str(world / "text"),
        out=str(world / "shards"),
        top_k=8,
        max_length=24,
        eval_share=0.2,
        shard_rows=500,
        batch_size=4,
    )
    return CaptureArguments(**(options | changes))


def distill_words(world, **changes):
    options = {
        "teacher_shards": world / "shards",
        "student": world / "student",
        "method": "forward_kl",
        "data": world / "text",
        "output_dir": world / "run",
        "eval_share": 0.2,
        "max_length": 24,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": "true",
        "overwrite": "true",
    }
    merged = {name: value for name, value in (options | changes).items() if value is not None}
    return [str(word) for name, value in merged.items() for word in (f"--{name}", value)]


def content(folder):
    """What a capture leaves, but for its report, which has times in it."""
    paths = [*folder.glob("shard-*"), folder / "manifest.json"]
    return {path.name: path.read_bytes() for path in paths}


@pytest.mark.parametrize("values", ["exact", "compact"])
def test_shards_are_what_the_teacher_says(world, tokenizer, capsys, values):
    from transformers import AutoModelForCausalLM

    from stillhouse import data
    from stillhouse.train.examples import encode

    report = capture(arguments(world, values=values, temperature=2.0, batch_size=5))
    shards = TeacherShards(world / "shards")
    assert len(shards.parts) > 2
    records = data.read(world / "text")
    numbers, _ = data.holdout(records, 0.2)
    examples = encode(records, numbers, tokenizer, 24)
    shards.check(tokenizer=tokenizer, examples=examples)
    model = AutoModelForCausalLM.from_pretrained(world / "teacher").eval()
    for number in (0, 7, len(shards) - 1):
        ids = torch.from_numpy(examples[number].input_ids)[None].long()
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        want = (logits.double() / 2).log_softmax(-1)
        got = shards.rows(number)
        top = want.topk(8, -1)
        tolerance = {"exact": 1e-5, "compact": 2e-2}[values]
        torch.testing.assert_close(got.log_probs.double(), top.values, rtol=0, atol=tolerance)
        assert torch.equal(got.ids.long(), top.indices)
        rest = (1 - top.values.exp().sum(-1)).log()
        torch.testing.assert_close(got.log_rest.double(), rest, rtol=0, atol=tolerance)
    written = json.loads((world / "shards" / "report.json").read_text())
    assert written["rows"] == shards.row_count == report.values["rows"]
    assert written["over_bare_forward"] > 1
    assert (world / "shards" / "mass.png").stat().st_size > 1000
    mass = written["curves"]["mass"]["series"][str(world / "teacher")][1]
    assert 0 < mass[0] < mass[-1] < 1
    assert "stillhouse distill --teacher-shards" in capsys.readouterr().out
    assert capture(arguments(world, values=values, temperature=2.0)) is None  # all there


@pytest.mark.parametrize("method", ["reverse_kl", "jsd", "support_kl"])
def test_draws_are_for_what_is_linear_in_the_teacher(world, method):
    """Columns that nothing fell on have no mass: reverse KL would be infinite, others biased."""
    capture(arguments(world, draws=4))
    with pytest.raises(UsageError, match=f"--method {method} would take for the teacher"):
        distillation.distill(*parse(distill_words(world, method=method)))


def test_draws_leave_nothing_to_the_tail(world):
    """Of each row the four largest and four draws of the others; the same in parts as in one."""
    capture(arguments(world, draws=4, values="exact"))
    capture(arguments(world, values="exact", out=str(world / "plain")))
    shards, plain = TeacherShards(world / "shards"), TeacherShards(world / "plain")
    assert (shards.schema.k, shards.schema.draws) == (8, 4)
    for number in (0, 5):
        drawn, largest = shards.rows(number), plain.rows(number)
        assert torch.equal(drawn.ids[:, :4], largest.ids[:, :4])
        assert (drawn.log_rest == -torch.inf).all()
        mass = drawn.log_probs.double().exp().sum(-1)
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-5)
        columns = [row[row >= 0].tolist() for row in drawn.ids]
        assert all(len(set(row)) == len(row) for row in columns)
    for part in ("1/2", "2/2"):
        capture(arguments(world, draws=4, values="exact", out=str(world / "parts"), part=part))
    assert content(world / "parts") == content(world / "shards")
    report = distillation.distill(*parse(distill_words(world)))
    assert losses(report)[-1] < losses(report)[0]


def losses(report):
    series = report.curves["loss"]["series"]
    return next(iter(series.values()))[1]


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_train_epochs": 2, "max_steps": -1, "dataloader_num_workers": 2}],
    ids=["one-loader", "epochs-and-workers"],
)
def test_all_columns_train_as_the_teacher_itself(world, changes):
    """k = V: the master test, through files, loader, trainer and kernels."""
    capture(arguments(world, top_k=259, values="exact"))
    changes = changes | {"method": "jsd"}
    stored = distillation.distill(*parse(distill_words(world, **changes)))
    online = distillation.distill(
        *parse(distill_words(world, **changes, teacher_shards=None, teacher=world / "teacher"))
    )
    assert losses(stored) == pytest.approx(losses(online), rel=1e-5)
    perplexity = [report.values["perplexity"]["student"] for report in (stored, online)]
    assert perplexity[0] == pytest.approx(perplexity[1], rel=1e-4)
    assert stored.values["kl_to_teacher"] is None
    assert online.values["kl_to_teacher"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        dict(method="support_kl"),
        dict(method="reverse_kl", teacher_tail="uniform"),
        dict(student="layers:0,2@{world}/teacher", control="true"),
        dict(method="jsd", teacher_tail="uniform", eval_share=0.2, label_weight=0.5),
    ],
    ids=lambda changes: "-".join(changes),
)
def test_other_ways(world, changes, monkeypatch):
    from stillhouse.train import models

    capture(arguments(world, values="compact"))
    changes = {n: v.format(world=world) if isinstance(v, str) else v for n, v in changes.items()}
    seen, load = [], models.load_model
    monkeypatch.setattr(models, "load_model", lambda *a: seen.append(a[0]) or load(*a))
    report = distillation.distill(*parse(distill_words(world, **changes)))
    assert losses(report)[-1] < losses(report)[0]
    assert str(world / "teacher") not in seen or "@" in str(changes.get("student"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(teacher="teacher"), UsageError, "two teachers: name one"),
        (dict(method="taid"), UsageError, "taid cannot be trained from --teacher_shards"),
        (dict(method="cross_entropy"), UsageError, "cross_entropy needs no teacher"),
        (dict(teacher_shards=None, teacher="teacher", teacher_tail="drop"), UsageError, "is miss"),
        (dict(method="tvd", teacher_tail="drop"), UsageError, "it takes --teacher_tail bucket"),
        (dict(temperature=2), UsageError, "captured at temperature 1: train at it"),
        (dict(teacher_shards="nowhere"), ShardError, "the capture is not finished"),
        (dict(data="other"), ShardError, "than this data gives"),
        (dict(max_length=23), ShardError, "the data gives"),
        (dict(eval_share=0.5), ShardError, "the data gives"),
        (dict(vocab_size=258), ShardError, "has 259 columns, the student 258"),
        (dict(student="layers:0"), ValueError, r"or the model that they are of \(layers:0@MODEL\)"),
    ],
)
def test_mismatches_are_errors_before_the_first_step(world, changes, error, message, monkeypatch):
    from stillhouse.train.trainer import DistillTrainer

    capture(arguments(world))
    monkeypatch.setattr(DistillTrainer, "train", lambda *a, **o: pytest.fail("a step was taken"))
    for name in ("teacher", "data", "teacher_shards"):
        if changes.get(name) is not None:
            changes = changes | {name: world / changes[name]}
    with pytest.raises(error, match=message) as caught:
        distillation.distill(*parse(distill_words(world, **changes)))
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_refused(world, tokenizer):
    capture(arguments(world))
    tokenizer.add_special_tokens({"bos_token": "<|other|>"})
    tokenizer.save_pretrained(world / "student")
    with pytest.raises(ShardError, match="captured with another tokenizer"):
        distillation.distill(*parse(distill_words(world)))


def test_a_torn_shard_is_an_error_before_the_first_step(world):
    capture(arguments(world))
    path = world / "shards" / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="the checksum of example"):
        distillation.distill(*parse(distill_words(world)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(top_k=0), UsageError, "--top-k must be at least 1"),
        (dict(top_k=260), UsageError, "--top-k 260 is more than 259 columns"),
        (dict(draws=8), UsageError, "--draws 8 are taken out of --top-k 8"),
        (dict(values="fp8"), UsageError, "--values must be one of"),
        (dict(temperature=0), UsageError, "--temperature must be positive"),
        (dict(part="3/2"), UsageError, "expected --part 1/4"),
        (dict(part="one"), UsageError, "expected --part 1/4"),
        (dict(data="/nowhere"), FileNotFoundError, "no data at"),
        (dict(max_length=200), ValueError, "longer than the 128 positions of the teacher"),
    ],
)
def test_flags_that_cannot_be(world, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        capture(arguments(world, **changes))
    assert "\n" not in str(caught.value)
    assert not list((world / "shards").glob("*"))


def test_the_command_says_it_in_one_line(world, monkeypatch, capsys):
    from stillhouse.cli import main

    words = command(world, world / "shards")[3:]
    monkeypatch.setattr(sys, "argv", ["stillhouse", *words, "--top_k", "260"])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.count("\n") == 1
    assert "--top-k 260 is more than 259 columns" in printed.err
    monkeypatch.setattr(sys, "argv", ["stillhouse", *words, "--part", "1/2"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main()
    assert "2 processes of torchrun: use one of them" in capsys.readouterr().err


def test_the_comparison_refuses_what_would_fail_in_its_middle(monkeypatch):
    from stillhouse.recipes import distill_cached

    monkeypatch.setattr(distill_cached, "capture", lambda *_: pytest.fail("the capture began"))
    for words, message in (
        (["--output-dir=x"], "--output_dir is runs/"),
        (["--maks_steps", "3"], "unknown argument --maks_steps"),
    ):
        with pytest.raises(UsageError, match=message):
            distill_cached.compare(words)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process, without torchrun"):
        distill_cached.compare([])


def test_an_example_without_a_target(world):
    """The last window of packed text may be one token, and alone in its batch and its shard."""
    from stillhouse import data
    from stillhouse.train.examples import encode

    (world / "one.txt").write_text("a" * 240)  # and the end: 241 tokens
    options = dict(data=str(world / "one.txt"), eval_data=str(world / "text"))
    assert len(encode(data.read(world / "one.txt"), range(1), tokenizer_of(world), 24)) == 11
    for batch_size, shard_rows in ((1, 500), (5, 500), (4, 23)):
        out = world / f"shards-{batch_size}-{shard_rows}"
        flags = options | {"batch_size": batch_size, "shard_rows": shard_rows, "out": str(out)}
        capture(arguments(world, **flags))
        shards = TeacherShards(out)
        assert [len(shards.rows(number).ids) for number in range(len(shards))] == [23] * 10 + [0]
        words = distill_words(world, **options, teacher_shards=out, eval_share=None)
        assert losses(distillation.distill(*parse(words)))


def tokenizer_of(world):
    from stillhouse.train import models

    return models.load_tokenizer(str(world / "teacher"))


def test_another_capture_is_not_overwritten_unasked(world):
    capture(arguments(world))
    first = content(world / "shards")
    with pytest.raises(ShardError, match="holds another capture: --overwrite"):
        capture(arguments(world, top_k=9))
    (world / "shards" / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"its k is 8, not 9 \(--overwrite"):
        capture(arguments(world, top_k=9))
    capture(arguments(world, top_k=9, shard_rows=10**6, overwrite=True))
    assert set(content(world / "shards")) == {"shard-00000.safetensors", "manifest.json"}
    capture(arguments(world, overwrite=True))
    assert content(world / "shards") == first


def test_a_damaged_shard_is_captured_again(world, capsys):
    capture(arguments(world))
    first = content(world / "shards")
    path = world / "shards" / "shard-00001.safetensors"
    rest = bytearray(path.read_bytes())
    rest[-5] ^= 1
    for harm in (
        lambda: os.truncate(path, 2000),
        path.unlink,
        lambda: path.write_bytes(rest),
        (world / "shards" / "manifest.json").unlink,
    ):
        harm()
        capture(arguments(world))
        assert content(world / "shards") == first
        assert not list((world / "shards").glob("*.partial*"))
    assert capsys.readouterr().out.count("finished shards are kept") == 3
    (world / "shards" / "manifest.json").write_text("{")
    with pytest.raises(ShardError, match="delete it, and the capture goes on with its shards"):
        capture(arguments(world))
    assert capture(arguments(world, shard_rows=10**6, overwrite=True)) is not None
    # Shards of another size are the same capture, which is there.
    assert capture(arguments(world)) is None
    assert set(content(world / "shards")) == {"shard-00000.safetensors", "manifest.json"}


def test_several_processes_write_what_one_writes(world, capsys):
    capture(arguments(world))
    capture(arguments(world, out=str(world / "parts"), part="2/3"))
    assert not (world / "parts" / "manifest.json").exists()
    printed = capsys.readouterr().out
    assert "process 2 of 3: " in printed
    assert "shards of other processes are not there yet" in printed
    with pytest.raises(ShardError, match="the capture is not finished"):
        TeacherShards(world / "parts")
    capture(arguments(world, out=str(world / "parts"), part="3/3"))
    first = world / "parts" / "shard-00001.safetensors"
    os.truncate(first, 2000)
    assert capture(arguments(world, out=str(world / "parts"), part="1/3")) is None
    assert "done; 1 shards of other processes" in capsys.readouterr().out
    assert capture(arguments(world, out=str(world / "parts"), part="2/3")) is not None
    assert content(world / "parts") == content(world / "shards")
    (world / "parts" / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"its k is 8, not 9 \(--overwrite"):
        capture(arguments(world, out=str(world / "parts"), part="1/3", top_k=9))


def command(world, out, *launcher):
    flags = {
        "teacher": world / "teacher",
        "data": world / "text",
        "out": out,
        "top-k": 8,
        "max-length": 24,
        "eval-share": 0.2,
        "shard-rows": 60,
        "batch-size": 2,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", *launcher, "stillhouse", "capture", *words]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}


def test_torchrun_shares_the_work(world):
    launcher = ["torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m"]
    printed = {}
    for out, words in (("one", []), ("two", launcher)):
        printed[out] = subprocess.run(
            command(world, world / out, *words),
            check=True,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
        ).stdout
    assert content(world / "two") == content(world / "one")
    shares = re.findall(r"process (\d) of 2: (\d+) of (\d+) shards", printed["two"])
    assert sorted(place for place, _, _ in shares) == ["1", "2"]
    assert sum(int(own) for _, own, _ in shares) == int(shares[0][2]) > 40
    assert "process" not in printed["one"]


def test_killed_five_times_the_result_is_the_same(world):
    subprocess.run(
        command(world, world / "whole"), check=True, env=ENVIRONMENT, capture_output=True
    )
    want = content(world / "whole")
    assert len(want) > 40
    out, chance, kept = world / "killed", random.Random(2), {}
    for round_ in range(5):
        process = subprocess.Popen(command(world, out), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        # Each time some shards later than before, at any point of one.
        target = len(kept) + chance.randint(1, 8)
        deadline = time.monotonic() + 120
        while len(list(out.glob("shard-*.safetensors"))) < target:
            assert process.poll() is None, "it was done before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        times = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.safetensors")}
        for name, when in kept.items():
            assert times[name] == when, f"{name} was written again in round {round_}"
        kept = times
        assert not (out / "manifest.json").exists()
    subprocess.run(command(world, out), check=True, env=ENVIRONMENT, capture_output=True)
    assert content(out) == want
