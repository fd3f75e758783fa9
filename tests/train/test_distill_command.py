"""`stillhouse distill` from the command line to the report, on a tiny teacher."""

import json
import random
import re
import shutil

import pytest
import torch

from stillhouse.errors import UsageError
from stillhouse.recipes import distill as job
from stillhouse.train.arguments import parse


@pytest.fixture
def world(tmp_path, llama, tokenizer):
    """A folder with a teacher, text, and what can be wrong with either."""
    llama(3, seed=1).save_pretrained(tmp_path / "teacher")
    llama(1).save_pretrained(tmp_path / "student")
    llama(1, vocab_size=300).save_pretrained(tmp_path / "wide")
    llama(1, vocab_size=250).save_pretrained(tmp_path / "narrow")
    for name in ("teacher", "student", "wide"):
        tokenizer.save_pretrained(tmp_path / name)
    llama(1).save_pretrained(tmp_path / "foreign")
    tokenizer.add_special_tokens({"bos_token": "<|other|>"})
    tokenizer.save_pretrained(tmp_path / "foreign")
    words = random.Random(1)
    (tmp_path / "text").mkdir()
    for number in range(12):
        text = "".join(words.choices("abcdefgh ", k=300))
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("one document")
    (tmp_path / "torn.jsonl").write_text('{"text": ')
    (tmp_path / "fake.gguf").write_text("not a model")
    return tmp_path


def words(world, **changes):
    options = {
        "teacher": world / "teacher",
        "student": "layers:0,2",
        "data": world / "text",
        "output_dir": world / "run",
        "eval_share": 0.2,
        "max_length": 24,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "use_cpu": "true",
    }
    merged = {name: value for name, value in (options | changes).items() if value is not None}
    return [str(word) for name, value in merged.items() for word in (f"--{name}", value)]


def test_from_flags_to_report(world, capsys):
    flags = words(world, eval_strategy="steps", eval_steps=2, control="true")
    assert job.main(flags) == 0
    output = capsys.readouterr().out
    report = json.loads((world / "run" / "report.json").read_text())
    assert set(report["perplexity"]) == {
        *("teacher", "untouched", "student", "control", "control_equal_seconds")
    }
    assert all(value > 1 for value in report["perplexity"].values())
    assert report["tokens"]["student"] == report["tokens"]["control"] > 0
    assert report["steps"]["student"] == report["steps"]["control"] == 4
    assert 0 < report["acceptance"] < 1
    assert report["kl_to_teacher"] > 0
    seconds = report["seconds"]
    assert {"teacher", "student", "loss", "total"} <= set(seconds)
    rates = re.findall(r"taid step .* ([\d,]+) tokens/s", output)
    printed = [float(rate.replace(",", "")) for rate in rates]
    assert min(printed) * 0.9 < report["tokens_per_second"] < max(printed) * 1.1
    assert report["configuration"]["method"] == "taid"
    assert report["versions"]["torch"]
    changed = report["configuration"]["training"]
    assert changed["learning_rate"] == 0.01
    assert not {"hub_token", "lr_scheduler_type", "weight_decay"} & set(changed)
    assert not {"None", "[]", "{}"} & {str(value) for value in changed.values()}
    assert len(report["generations"]) == 2
    assert report["load"] in output
    assert (world / "run" / "loss.png").stat().st_size > 1000
    assert "tokens/s" in output
    assert "left" in output
    assert "eval_perplexity" in output

    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = AutoModelForCausalLM.from_pretrained(world / "run" / "student")
    assert student.config.num_hidden_layers == 2
    assert student.dtype == torch.float32
    AutoTokenizer.from_pretrained(world / "run" / "student")


@pytest.mark.parametrize(
    "changes",
    [
        dict(method="jsd", method_options="beta=0.3", temperature=2, label_weight=0.5),
        dict(student="student", method="reverse_kl"),
        dict(teacher=None, student="student", method="cross_entropy"),
        dict(lora_rank=2),
        dict(student="wide", vocab_size=259, method="skew_kl"),
        dict(eval_data="one.txt", gradient_accumulation_steps=2, bf16="true"),
        dict(on_policy=0.5, max_new_tokens=4, control="true", gradient_accumulation_steps=2),
        dict(lora_rank=2, on_policy=1, max_new_tokens=4, replay=8, gradient_checkpointing="true"),
        dict(on_policy_adapts="true", max_new_tokens=4, eval_strategy="steps", eval_steps=1),
    ],
    ids=lambda changes: "-".join(changes),
)
def test_other_ways(world, changes):
    for name in ("student", "eval_data"):
        if name in changes:
            changes = changes | {name: world / changes[name]}
    report = job.distill(*parse(words(world, **changes)))
    assert report.values["perplexity"]["student"] > 1
    assert (world / "run" / "student" / "model.safetensors").exists()
    merged = (world / "run" / "student" / "config.json").exists()
    assert merged
    assert not (world / "run" / "student" / "adapter_config.json").exists()


def test_nothing_is_overwritten_unasked(world, capsys):
    assert job.main(words(world)) == 0
    assert job.main(words(world)) == 2
    assert "already holds checkpoint-4: continue with --resume" in capsys.readouterr().err
    assert job.main([*words(world), "--overwrite"]) == 0
    # A student alone is worth keeping, too; a checkpoint of another trainer is not ours to delete.
    shutil.rmtree(world / "run" / "checkpoint-4")
    assert job.main(words(world)) == 2
    assert "already holds student" in capsys.readouterr().err
    (world / "run" / "checkpoint-9").mkdir()
    (world / "run" / "checkpoint-9" / "trainer_state.json").write_text("{}")
    assert job.main([*words(world), "--resume"]) == 2
    assert "checkpoint-9, which another trainer wrote" in capsys.readouterr().err
    assert job.main([*words(world), "--overwrite"]) == 0
    # A run that is over is resumed without a step.
    weights = (world / "run" / "student" / "model.safetensors").read_bytes()
    report = job.distill(*parse([*words(world), "--resume"]))
    assert report.values["steps"]["student"] == 4
    assert (world / "run" / "student" / "model.safetensors").read_bytes() == weights
    (world / "run" / "checkpoint-4" / "complete").unlink()
    assert job.main([*words(world), "--resume"]) == 0
    assert "it was not written to its end" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(teacher="missing.gguf"), FileNotFoundError, "no GGUF file at .*missing.gguf"),
        (dict(teacher="fake.gguf"), ValueError, "fake.gguf is not a GGUF file"),
        (dict(teacher="nowhere/at/all"), FileNotFoundError, "no model at"),
        (dict(teacher="text"), (ValueError, FileNotFoundError), "cannot load a causal language"),
        (dict(data="nowhere.txt"), FileNotFoundError, "no data at"),
        (dict(data="empty.txt"), ValueError, "empty.txt is empty"),
        (dict(data="torn.jsonl"), ValueError, "cannot read .*torn.jsonl"),
        (dict(data="one.txt"), ValueError, "the data is one document"),
        (dict(student="wide"), ValueError, "vocabulary mismatch: student has 300 .* teacher 259"),
        (dict(student="narrow"), ValueError, "vocabulary mismatch: student has 250"),
        (dict(student="foreign"), ValueError, "tokenizer mismatch: .* differs is '<.other.>'"),
        (dict(student="wide", vocab_size=270), ValueError, "vocab_size must be within both heads"),
        (dict(student="wide", vocab_size=200), ValueError, "vocab_size must hold the tokenizer's"),
        (dict(student="layers:0,3"), ValueError, "layer 3 does not exist: the model has 3 blocks"),
        (dict(student="layers:0,x"), ValueError, "expected --student layers:0,1,2"),
        (dict(max_length=999), ValueError, "--max_length 999: longer than the 128 positions"),
        (dict(max_length=1), ValueError, "max_length must be at least 2"),
        (
            dict(learning_rate="1e30", method="forward_kl"),
            ValueError,
            "loss is .* in step .*records .* checkpoint",
        ),
        (
            dict(method="telepathy"),
            UsageError,
            "no method 'telepathy' .* taid, sinkd, .*forward_kl",
        ),
        (dict(method_options="gamma=1"), UsageError, "--method taid does not take these options"),
        (dict(method_options="alpha=[1"), UsageError, "alpha=.1 cannot be read"),
        (dict(label_smoothing_factor=0.1), ValueError, "belongs to the Trainer's own loss"),
        (dict(method_options="gamma"), UsageError, "expected --method_options name=value"),
        (dict(method="jsd", method_options="beta=2"), ValueError, "JSD.beta must lie in"),
        (dict(label_weight=2), ValueError, r"label_weight is a share in \[0, 1\]"),
        (dict(teacher=None, student="student"), UsageError, "--teacher is missing: taid compares"),
        (dict(teacher=None, student="layers:0", method="cross_entropy"), ValueError, "a teacher"),
        (dict(resume_from_checkpoint="text"), UsageError, "is no complete checkpoint"),
        (dict(student=None), UsageError, "--student is missing"),
        (dict(teacher_dtype="int3"), UsageError, "teacher.dtype.*int3"),
        (
            dict(on_policy=0.5, max_new_tokens=105),
            ValueError,
            "--max_length 24 and --max_new_tokens 105: longer than the 128 positions",
        ),
        (dict(on_policy=2), UsageError, r"--on_policy is a share in \[0, 1\], got 2"),
        (dict(on_policy=-0.5), UsageError, r"--on_policy is a share in \[0, 1\], got -0.5"),
        (dict(replay=9), UsageError, "--replay is of the student's responses"),
        (dict(on_policy_adapts="true"), UsageError, "add --eval_strategy steps"),
        (dict(max_step=3), UsageError, "unknown argument --max_step"),
        (dict(max_steps="many"), UsageError, "max.steps.*many"),
    ],
    ids=lambda value: "-".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_wrong_input(world, capsys, changes, error, message):
    for name, value in changes.items():
        if (world / str(value)).exists() or (name in ("teacher", "data") and value):
            changes = changes | {name: world / value}
    flags = words(world, **changes)
    with pytest.raises(error, match=message):
        job.distill(*parse(flags))
    capsys.readouterr()
    # From the command line: one line, an exit code, no traceback.
    status = job.main([*flags, "--overwrite"] if "learning_rate" in changes else flags)
    said = capsys.readouterr().err
    assert status in (1, 2)
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("stillhouse: error: ")
    assert said.count("stillhouse: error") == 1


def test_a_traceback_on_request(world, capsys):
    assert job.main([*words(world, data="nowhere"), "--debug"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "no data at" in error


def test_flags_win_over_the_file(world):
    config = world / "job.yaml"
    config.write_text(
        "teacher: a\nstudent: b\ndata: c\nmethod: taid\nmethod_options: [alpha=auto]\n"
        "learning_rate: 1e-3\nmax_steps: 7\nbf16: false\nlr_scheduler_kwargs: {num_cycles: 2}\n"
        "eval_data: null\n"
    )
    ours, training = parse(["--config", str(config), "--max-steps", "9", "--student=s"])
    assert (ours.teacher, ours.student, ours.eval_data) == ("a", "s", None)
    assert ours.method_options == ["alpha=auto"]
    assert training.max_steps == 9
    assert training.learning_rate == 1e-3
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    # The options of the file's method do not go to another one.
    ours, _ = parse([f"--config={config}", "--method", "jsd"])
    assert ours.method_options == []
    as_json = world / "job.json"
    as_json.write_text(json.dumps({"student": "b", "data": "c", "max_steps": 5}))
    assert parse(["--config", str(as_json)])[1].max_steps == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stduent: b", "unknown option 'stduent'"),
        ("- a", "must map names to values"),
        ("a: [", "neither YAML nor JSON"),
        ("max_steps: many", "many"),
    ],
)
def test_a_wrong_file(tmp_path, content, message):
    path = tmp_path / "job.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        parse(["--config", str(path)])
    assert "\n" not in str(error.value)


def test_the_file_is_missing(tmp_path):
    with pytest.raises(UsageError, match="cannot read the configuration"):
        parse(["--config", str(tmp_path / "no.yaml")])
    with pytest.raises(UsageError, match="--config needs a file"):
        parse(["--config"])


def test_the_demonstration_is_valid():
    ours, training = parse(["--config", str(job.DEMONSTRATION)])
    assert ours.student == "layers:0,1,2,10,20,29"
    assert ours.method == "taid"
    assert training.max_steps > 0
    job.build_objective(ours)


def test_numbers_of_method_options():
    arguments, _ = parse(
        ["--student=s", "--data=d", "--method_options", "alpha=5e-4", "beta=1e-1", "t_start=0.2"]
    )
    objective = job.build_objective(arguments)
    assert (objective.alpha, objective.beta, objective.t_start) == (5e-4, 0.1, 0.2)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the flag is decided by the machine")
def test_bf16_without_an_accelerator():
    # transformers alone refuses it unless --use_cpu is given too.
    _, training = parse(["--student", "s", "--data", "d", "--bf16"])
    assert training.bf16
    assert training.device.type == "cpu"


def test_help(capsys):
    assert job.main(["--help"]) == 0
    short = capsys.readouterr().out
    assert "--teacher_dtype" in short
    assert "--help-all" in short
    assert len(short.splitlines()) < 60
    assert job.main(["--help-all"]) == 0
    everything = capsys.readouterr().out
    assert "--ddp_bucket_cap_mb" in everything
    assert "--label_weight" in everything
