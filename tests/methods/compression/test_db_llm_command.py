"""Models of dual-binary layers on disk, and in `stillhouse distill`."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from stillhouse.errors import UsageError
from stillhouse.methods.compression import load_fdb, quantize_fdb_, save_fdb
from stillhouse.nn import FDBLinear
from stillhouse.train.models import load_model, load_student

PROMPT = torch.tensor([[5, 80, 12, 200]])


def generated(model):
    return model.generate(PROMPT, max_new_tokens=12, do_sample=False, pad_token_id=257).tolist()


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_a_model_comes_back_and_writes_the_same(llama, tmp_path, options):
    model = llama(**options)
    quantize_fdb_(model, 16)
    training = model(PROMPT).logits
    model.generation_config.max_length = 77
    save_fdb(model, tmp_path / "model")
    torch.testing.assert_close(model(PROMPT).logits, training, rtol=1e-4, atol=1e-4)
    again = load_fdb(tmp_path / "model")
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    assert generated(again) == generated(model)
    assert len(generated(model)[0]) > 4
    assert again.generation_config.max_length == 77
    assert torch.equal(load_model(str(tmp_path / "model"))(PROMPT).logits, model(PROMPT).logits)
    layer = again.model.layers[0].self_attn.q_proj
    assert isinstance(layer, FDBLinear)
    assert layer.frozen
    assert layer.group_size == 16
    # Nobody takes it for a dense model.
    with pytest.raises(ValueError, match="llama-fdb"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    # It can be saved again, in the same place.
    save_fdb(again, tmp_path / "model")
    assert torch.equal(load_fdb(tmp_path / "model")(PROMPT).logits, model(PROMPT).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_in_half_precision_the_scales_stay(llama, tmp_path):
    model = llama()
    quantize_fdb_(model, 16)
    save_fdb(model, tmp_path / "model")
    half = load_fdb(tmp_path / "model", torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    mine, theirs = (each.model.layers[0].mlp.up_proj for each in (half, model))
    assert torch.equal(mine.alpha, theirs.alpha)
    assert half(PROMPT).logits.dtype == torch.bfloat16
    assert load_fdb(tmp_path / "model").lm_head.weight.dtype == torch.float32


def test_folders_that_are_none(llama, tmp_path):
    model = llama()
    with pytest.raises(ValueError, match="no dual-binary layer"):
        save_fdb(model, tmp_path / "model")
    model.save_pretrained(tmp_path / "dense")
    for folder in (tmp_path / "dense", tmp_path / "nothing"):
        with pytest.raises(ValueError, match="is no folder of save_fdb"):
            load_fdb(folder)
    quantize_fdb_(model, 16)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("of mine")
    with pytest.raises(ValueError, match="something else than a model"):
        save_fdb(model, tmp_path / "notes")
    assert (tmp_path / "notes" / "a.txt").read_text() == "of mine"
    save_fdb(model, tmp_path / "model")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    del state["model.layers.0.mlp.up_proj.planes"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not hold the weights .*up_proj\.planes"):
        load_fdb(tmp_path / "model")


def test_the_command_learns(assert_learns):
    assert_learns("db-llm", label_weight=0.1, method_options="gamma=0.3")


def test_the_command_trains_students_of_two_bits(distilled, tmp_path):
    flags = {"student": f"fdb:16@{tmp_path / 'teacher'}", "max_steps": 12}
    report = distilled("db-llm", **flags)
    series = report.curves["loss"]["series"]["db-llm"][1]
    assert series[-1] < series[0]
    assert len(report.values["generations"]) == 2
    folder = tmp_path / "run" / "student"
    found, dense = load_model(str(folder)), load_model(str(tmp_path / "teacher"))
    layer = found.model.layers[0].mlp.up_proj
    assert isinstance(layer, FDBLinear)
    assert layer.frozen
    assert torch.equal(found.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    untouched = load_student(flags["student"], None)
    assert not torch.equal(layer.alpha, untouched.model.layers[0].mlp.up_proj.scales().half())
    # The command's own measure of it, on the same text.
    again = distilled("db-llm", student=folder, output_dir=tmp_path / "again", max_steps=1)
    names = [row["model"] for row in again.tables["held-out text"]]
    before, after = (
        each.tables["held-out text"][names.index(name)]["perplexity"]
        for each, name in ((report, "db-llm"), (again, "untouched student"))
    )
    assert after == pytest.approx(before, rel=1e-4)


def test_a_resumed_run_is_the_run(distilled, tmp_path):
    flags = {"student": f"fdb:16@{tmp_path / 'student'}", "save_steps": 3}
    distilled("db-llm", **flags)
    checkpoint, folder = tmp_path / "run" / "checkpoint-3", tmp_path / "again"
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert [entry["weight_spread"] > 0 for entry in log if "loss" in entry] == [True] * 3
    distilled("db-llm", resume_from_checkpoint=checkpoint, output_dir=folder, **flags)
    whole, resumed = (load_model(str(each / "student")) for each in (tmp_path / "run", folder))
    for (name, mine), theirs in zip(
        resumed.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_what_learns_of_a_student_of_two_bits(llama, tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    student = load_student(f"fdb:16@{tmp_path / 'dense'}", None)
    learning = {name for name, each in student.named_parameters() if each.requires_grad}
    assert learning == {name for name, _ in student.named_parameters() if name.endswith(".change")}
    assert len(learning) == 14


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"student": "fdb:four@x"}, ValueError, "expected --student fdb:64@STUDENT"),
        ({"student": "fdb:16"}, ValueError, "expected --student fdb:64@STUDENT"),
        ({"student": "fdb:16@x", "lora_rank": 2}, UsageError, "no adapters for weights of two"),
        ({"method_options": "gamma=2"}, ValueError, "gamma must be in"),
    ],
)
def test_flags_that_do_not_fit(distilled, flags, error, message):
    with pytest.raises(error, match=message) as raised:
        distilled("db-llm", **flags)
    assert "\n" not in str(raised.value)


def test_two_bits_or_experts_and_once(llama, tmp_path):
    dense = tmp_path / "dense"
    llama().save_pretrained(dense)
    for spec in (
        f"fdb:16@fdb:16@{dense}",
        f"experts:2@fdb:16@{dense}",
        f"fdb:16@experts:2@{dense}",
    ):
        with pytest.raises(ValueError, match="experts or weights of two bits, and once"):
            load_student(spec, None)
