"""Torn checkpoints do not count, and a killed run that resumes equals one left in peace."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from stillhouse.train.checkpoints import (
    checkpoints,
    is_complete,
    is_foreign,
    mark_complete,
    newest_complete,
    prune,
    remove_torn,
)


def make(directory, step, complete=True):
    folder = directory / f"checkpoint-{step}"
    (folder / "part").mkdir(parents=True)
    (folder / "model.bin").write_bytes(b"12345")
    (folder / "part" / "optimizer.bin").write_bytes(b"678")
    if complete:
        mark_complete(folder)
    return folder


def test_what_is_complete(tmp_path):
    whole = make(tmp_path, 9)
    assert is_complete(whole)
    assert not is_complete(make(tmp_path, 10, complete=False))
    short, missing = make(tmp_path, 11), make(tmp_path, 12)
    (short / "model.bin").write_bytes(b"123")
    (missing / "part" / "optimizer.bin").unlink()
    assert not is_complete(short)
    assert not is_complete(missing)
    (make(tmp_path, 13) / "complete").write_text("{")
    (tmp_path / "checkpoint-best").mkdir()
    assert next(path.name for path in checkpoints(tmp_path)) == "checkpoint-9"
    assert newest_complete(tmp_path) == whole
    gone = remove_torn(tmp_path)
    assert [path.name for path in gone] == [f"checkpoint-{step}" for step in (10, 11, 12, 13)]
    assert checkpoints(tmp_path) == [whole]
    assert newest_complete(tmp_path / "nowhere") is None


def test_a_foreign_checkpoint_is_no_torn_one(tmp_path):
    foreign, torn = make(tmp_path, 1, complete=False), make(tmp_path, 2, complete=False)
    (foreign / "trainer_state.json").write_text("{}")
    assert is_foreign(foreign)
    assert not is_foreign(torn)
    assert not is_foreign(make(tmp_path, 3))


def test_prune_keeps_the_newest_and_the_protected(tmp_path):
    for step in (2, 10, 30, 100):
        make(tmp_path, step)
    torn = make(tmp_path, 200, complete=False)
    prune(tmp_path, 2, protected=tmp_path / "checkpoint-2")
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["checkpoint-2", "checkpoint-30", "checkpoint-100", torn.name]


STEPS = 36


@pytest.fixture
def command(tmp_path, llama, tokenizer):
    """command(name, *flags): a run of 36 steps as a process, its output a pipe."""
    # With dropout, so that a resumed run must restore the random state too.
    llama(3, seed=1, attention_dropout=0.1).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    words = "".join(random.Random(1).choices("abcdefgh ", k=6000))
    (tmp_path / "text.txt").write_text(words)

    def start(name, *flags, **environment):
        options = {
            "--teacher": tmp_path / "teacher",
            "--student": "layers:0,2",
            "--data": tmp_path / "text.txt",
            "--eval_share": 0,
            "--max_length": 32,
            "--method_options": "alpha=auto",
            "--output_dir": tmp_path / name,
            "--max_steps": STEPS,
            "--per_device_train_batch_size": 4,
            "--gradient_accumulation_steps": 2,
            "--learning_rate": 1e-2,
            "--save_steps": 4,
            "--save_total_limit": 1,
            "--logging_steps": 1,
            "--use_cpu": "true",
        }
        words = [str(word) for pair in options.items() for word in pair]
        return subprocess.Popen(
            [sys.executable, "-m", "stillhouse", "distill", *words, *flags],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )

    return start


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.stdout.read()
    assert process.wait() == -signal.SIGKILL


def kill_after(process, steps, pause):
    """SIGKILL `pause` seconds after the process has told of that many steps."""
    for line in process.stdout:
        steps -= "step " in line
        if steps <= 0:
            break
    time.sleep(pause)
    kill(process)


def kill_inside_checkpoint(process, directory):
    """SIGKILL while the hook sleeps between the weights and the optimiser's state."""
    for _ in range(3000):
        torn = [path for path in checkpoints(directory) if not is_complete(path)]
        if any((path / "model.safetensors").exists() for path in torn):
            break
        assert process.poll() is None, "ended before it wrote a checkpoint"
        time.sleep(0.02)
    kill(process)
    assert [path for path in checkpoints(directory) if not is_complete(path)]


def test_killed_six_times(command, tmp_path):
    """Once inside a checkpoint write, five times at random moments, then left alone."""
    disturbed = tmp_path / "disturbed"
    first = command("disturbed", STILLHOUSE_TEST_CHECKPOINT_SLEEP="1")
    # The first checkpoint is complete, the second one torn.
    while newest_complete(disturbed) is None:
        assert first.poll() is None
        time.sleep(0.02)
    kill_inside_checkpoint(first, disturbed)
    assert newest_complete(disturbed).name == "checkpoint-4"

    moments = random.Random(0)
    for _ in range(5):
        process = command("disturbed", "--resume")
        kill_after(process, steps=moments.randint(1, 7), pause=moments.random() * 0.05)
    last = command("disturbed", "--resume")
    output = last.stdout.read()
    assert last.wait() == 0
    assert "continuing from" in output

    peaceful = command("peaceful")
    assert "continuing" not in peaceful.stdout.read()
    assert peaceful.wait() == 0
    ours = load_file(disturbed / "student" / "model.safetensors")
    theirs = load_file(tmp_path / "peaceful" / "student" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    states = [
        torch.load(tmp_path / name / f"checkpoint-{STEPS}" / "distillation.pt")
        for name in ("disturbed", "peaceful")
    ]
    assert states[0]["objective"] == states[1]["objective"]
    assert states[0]["objective"]["t"] == 1
    assert states[0]["statistics"]["rows"] == states[1]["statistics"]["rows"]
    # Only the last one is kept, nothing torn is left.
    assert [path.name for path in checkpoints(disturbed)] == [f"checkpoint-{STEPS}"]
