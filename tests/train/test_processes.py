"""Two processes on the CPU train exactly as one does on both their batches."""

import json
import os
import random
import subprocess
import sys

import pytest


def test_two_processes_equal_one(tmp_path, llama, tokenizer):
    llama(2, seed=1).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    # Conversations of unlike length: a mean of the two ranks' means would be off.
    words = random.Random(1)
    with (tmp_path / "data.jsonl").open("w") as file:
        for _ in range(40):
            text = "".join(words.choices("abcdefgh ", k=words.randint(3, 40)))
            file.write(json.dumps({"prompt": "say", "response": text}) + "\n")

    def run(name, launcher, batch_size):
        flags = {
            "teacher": tmp_path / "teacher",
            "student": "layers:1",
            "data": tmp_path / "data.jsonl",
            "eval_share": 0.2,
            "max_length": 64,
            "method_options": "alpha=auto",
            "output_dir": tmp_path / name,
            "max_steps": 6,
            "gradient_accumulation_steps": 2,
            "control": "true",
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": 3,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_cpu": "true",
        }
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        subprocess.run(
            [sys.executable, "-m", *launcher, "stillhouse", "distill", *words],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"},
        )
        return json.loads((tmp_path / name / "report.json").read_text())

    one = run("one", [], 4)
    two = run("two", ["torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m"], 2)
    assert (one["processes"], two["processes"]) == (1, 2)
    losses = [report["curves"]["loss"]["series"]["taid"][1] for report in (one, two)]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for label in ("student", "control"):
        assert one["tokens"][label] == two["tokens"][label]
    assert two["perplexity"]["control"] == pytest.approx(one["perplexity"]["control"], rel=1e-4)
    for name in ("kl_to_teacher", "acceptance"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)
