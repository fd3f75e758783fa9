"""Shared by the methods' tests: a run of the command with a method."""

import pytest


@pytest.fixture
def distilled(tmp_path, llama, make_tokenizer):
    """distilled(method, **flags): the report of `stillhouse distill --method ...` on tiny models.

    All of it is in tmp_path; a flag that is None is left out.
    """
    from stillhouse.recipes import distill
    from stillhouse.train.arguments import parse

    for name, layers in (("teacher", 3), ("student", 1)):
        llama(layers, seed=layers).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "text").mkdir()
    for number in range(6):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} words of a text " * 20)

    def run(method, **flags):
        flags = {
            "teacher": tmp_path / "teacher",
            "student": tmp_path / "student",
            "data": tmp_path / "text",
            "output_dir": tmp_path / "run",
            "method": method,
            "max_length": 32,
            "max_steps": 6,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_cpu": "true",
            "eval_share": 0.2,
        } | flags
        given = {name: value for name, value in flags.items() if value is not None}
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        return distill.distill(*parse(words))

    return run


@pytest.fixture
def assert_learns(distilled):
    """assert_learns(method, **flags): the same, and the loss has come down."""

    def check(method, **flags):
        report = distilled(method, **flags)
        series = report.curves["loss"]["series"][method][1]
        assert series[-1] < series[0]

    return check
