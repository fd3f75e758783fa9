"""Several processes train exactly as one does on all their batches, with every engine that we name.

The launchers are those of docs/many-machines.md, on the CPU: each test asserts that they really
started the processes, which some of accelerate's flags do not.
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import stillhouse.recipes

FSDP2 = Path(stillhouse.recipes.__file__).with_name("fsdp2.yaml")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
ACCELERATE = ["accelerate.commands.launch"]
TORCHRUN = ["torch.distributed.run"]
MODULE = ["-m", "stillhouse"]
LAUNCHERS = {
    "DDP by torchrun": [*TORCHRUN, "--nproc_per_node=2", "--standalone", *MODULE],
    "DDP by accelerate": [*ACCELERATE, "--multi_gpu", "--num_processes=2", *MODULE],
    "FSDP2": [
        *ACCELERATE,
        f"--config_file={FSDP2}",
        "--num_processes=2",
        str(Path(__file__).with_name("sharded_on_cpu.py")),
    ],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama, make_tokenizer):
    """A teacher, and conversations of unlike length: a mean of two ranks' means would be off."""
    folder = tmp_path_factory.mktemp("processes")
    llama(2, seed=1).save_pretrained(folder / "teacher")
    make_tokenizer().save_pretrained(folder / "teacher")
    words = random.Random(1)
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(40):
            text = "".join(words.choices("abcdefgh ", k=words.randint(3, 40)))
            file.write(json.dumps({"prompt": "say", "response": text}) + "\n")
    return folder


def command(world, name, launcher, batch_size, **changes):
    flags = {
        "teacher": world / "teacher",
        "student": "layers:1",
        "data": world / "data.jsonl",
        "eval_share": 0.2,
        "max_length": 64,
        "method": "taid",
        "method_options": "alpha=auto",
        "output_dir": world / name,
        "max_steps": 6,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "use_cpu": "true",
    }
    flags = {flag: value for flag, value in (flags | changes).items() if value is not None}
    words = [str(word) for flag in flags.items() for word in ("--" + flag[0], flag[1])]
    return [sys.executable, "-m", *launcher, "distill", *words]


def start(world, name, launcher, batch_size, **changes):
    """Run to the end; not longer than five minutes, since processes may wait for each other."""
    return subprocess.run(
        command(world, name, launcher, batch_size, **changes),
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"},
    )


def run(world, name, launcher, batch_size, **changes):
    result = start(world, name, launcher, batch_size, **changes)
    assert result.returncode == 0, result.stderr[-2000:]
    if "resume" in changes:
        assert f"continuing from {world / name / 'checkpoint-3'}" in result.stdout
    return report(world, name)


def report(world, name):
    return json.loads((world / name / "report.json").read_text())


@pytest.fixture(scope="module")
def one(world):
    """One process, with a control."""
    return run(world, "one", ["stillhouse"], 4, control="true")


def curve(report):
    return report["curves"]["loss"]["series"]["taid"][1]


def check(report, one, engine):
    assert (one["processes"], report["processes"]) == (1, 2)
    assert report["engine"] == engine
    assert len(curve(one)) == 6
    assert curve(report) == pytest.approx(curve(one), rel=1e-5)
    assert report["tokens"]["student"] == one["tokens"]["student"]
    for name in ("kl_to_teacher", "acceptance"):
        assert report[name] == pytest.approx(one[name], rel=1e-4)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_processes_equal_one(world, one, name):
    control = name == "DDP by torchrun"
    changes = {"control": "true"} if control else {}
    two = run(world, name, LAUNCHERS[name], 2, **changes)
    check(two, one, "FSDP2" if name == "FSDP2" else "DDP")
    if control:
        assert two["tokens"]["control"] == one["tokens"]["control"]
        perplexity = [each["perplexity"]["control"] for each in (one, two)]
        assert perplexity[1] == pytest.approx(perplexity[0], rel=1e-4)


def test_two_processes_respond_as_one_does(world):
    """The student's likeliest responses, to each process's own prompts."""
    words = dict(on_policy=1.0, response_temperature=0.0, max_new_tokens=6, max_steps=3)
    words |= dict(method="forward_kl", method_options=None, save_strategy="no")
    one = run(world, "alone", ["stillhouse"], 4, **words)
    two = run(world, "together", LAUNCHERS["DDP by torchrun"], 2, **words)
    assert two["processes"] == 2
    series = [each["curves"]["loss"]["series"]["forward_kl"][1] for each in (one, two)]
    assert len(series[0]) == 3
    assert series[1] == pytest.approx(series[0], rel=1e-4)


def half_done(world, name):
    """A copy of a run that was stopped after three of its six steps, which says so: the losses of
    these are other numbers in its log."""
    folder = world / f"{name}, resumed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world / name, folder)
    shutil.rmtree(folder / "checkpoint-6")
    shutil.rmtree(folder / "student")
    path = folder / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    for entry in state["log_history"]:
        if "loss" in entry:
            entry["taid"] = entry["loss"] = 7.0
    path.write_text(json.dumps(state))
    sizes = json.loads((path.parent / "complete").read_text())
    sizes[path.name] = path.stat().st_size
    (path.parent / "complete").write_text(json.dumps(sizes))
    return folder.name


RESUMED = [
    ("DDP by torchrun", "one"),
    ("DDP by accelerate", "one"),
    ("FSDP2", "one"),
    ("DDP by torchrun", "DDP by torchrun"),
    ("FSDP2", "FSDP2"),
    ("one", "DDP by torchrun"),
]


@pytest.mark.parametrize(("before", "after"), RESUMED)
def test_half_by_some_and_the_rest_by_others(world, one, before, after):
    """Checkpoints of two processes go on with one, with two, and those of one with two."""
    if not (world / before / "checkpoint-3").exists():
        run(world, before, LAUNCHERS[before], 2)
    launcher, batch_size = (["stillhouse"], 4) if after == "one" else (LAUNCHERS[after], 2)
    resumed = run(world, half_done(world, before), launcher, batch_size, resume="true")
    assert resumed["processes"] == (1 if after == "one" else 2)
    assert curve(resumed)[:3] == [7.0] * 3
    assert curve(resumed)[3:] == pytest.approx(curve(one)[3:], rel=1e-5)


def test_what_sharded_processes_cannot_do(world, one, tmp_path):
    """Each is an error of all of them, at the start."""
    name = half_done(world, "one")
    result = start(world, name, LAUNCHERS["FSDP2"], 2, resume="true")
    assert result.returncode != 0
    assert "was not written by sharded processes" in result.stderr
    words = dict(on_policy=0.5, max_new_tokens=4)
    result = start(world, "responses", LAUNCHERS["FSDP2"], 2, **words)
    assert result.returncode != 0
    assert "a sharded student cannot respond while it trains: use DDP" in result.stderr
    result = start(world, "adapters", LAUNCHERS["FSDP2"], 2, lora_rank=2)
    assert result.returncode != 0
    assert "shards of adapters are not merged" in result.stderr
    config = tmp_path / "other.yaml"
    text = FSDP2.read_text()
    assert "FULL_STATE_DICT" in text
    config.write_text(text.replace("FULL_STATE_DICT", "SHARDED_STATE_DICT"))
    launcher = [f"--config_file={config}" if "config_file" in w else w for w in LAUNCHERS["FSDP2"]]
    result = start(world, "other", launcher, 2)
    assert result.returncode != 0
    assert "only FULL_STATE_DICT leaves a student" in result.stderr


def test_no_sharding_is_no_silent_matter(world):
    """accelerate does not shard on the CPU, and does not say so."""
    launcher = [*ACCELERATE, f"--config_file={FSDP2}", "--num_processes=2", *MODULE]
    result = start(world, "unsharded", launcher, 2)
    assert result.returncode != 0
    assert "accelerate does not shard with 2 processes on cpu" in result.stderr


def test_two_machines_equal_one(world, one):
    """Two launchers that find each other, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", f"--master_port={port}"]
    machines = [
        subprocess.Popen(
            command(world, "machines", [*words, f"--node_rank={rank}", *MODULE], 2),
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        assert [machine.wait(timeout=300) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()
    check(report(world, "machines"), one, "DDP")
