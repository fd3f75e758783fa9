"""`stillhouse distill --method llava-mod`, with dense students and with ones that have experts."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from stillhouse.errors import UsageError
from stillhouse.nn.moe import MoE
from stillhouse.train import mixtures
from stillhouse.train.models import load_model


def test_the_command_learns_and_refuses_pairs(assert_learns, distilled):
    assert_learns("llava-mod")
    with pytest.raises(UsageError, match="learns from pairs of a preferred and another") as raised:
        distilled("llava-mod", method_options="stage=preference", overwrite="true")
    assert "\n" not in str(raised.value)


def test_the_command_trains_experts(distilled, tmp_path):
    """The saved student has its experts again, only they have moved, and a run goes on with it."""
    flags = {"student": f"experts:4@{tmp_path / 'student'}", "method_options": "stage=mimic_ce"}
    report = distilled("llava-mod", trainable="*.experts.*", **flags)
    assert len(report.values["generations"]) == 2
    folder = tmp_path / "run" / "student"
    found, dense = load_model(str(folder)), load_model(str(tmp_path / "student"))
    mixture, layer = (model.model.layers[0].mlp for model in (found, dense))
    assert isinstance(mixture, MoE)
    assert not torch.equal(mixture.experts[0].up_proj.weight, layer.up_proj.weight)
    assert torch.equal(found.lm_head.weight, dense.lm_head.weight)
    # The command's own measure of it, on the same text.
    again = distilled("llava-mod", student=folder, output_dir=tmp_path / "again", max_steps=1)
    names = [row["model"] for row in again.tables["held-out text"]]
    before, after = (
        each.tables["held-out text"][names.index(name)]["perplexity"]
        for each, name in ((report, "llava-mod"), (again, "untouched student"))
    )
    assert after == pytest.approx(before, rel=1e-5)
    with pytest.raises(ValueError, match="with-mixtures"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_resumed_run_with_experts_is_the_run(distilled, tmp_path):
    """Weights, the optimiser's state, and what routers draw."""
    flags = {"student": f"experts:4@{tmp_path / 'student'}", "save_steps": 3}
    distilled("llava-mod", **flags)
    checkpoint, folder = tmp_path / "run" / "checkpoint-3", tmp_path / "again"
    distilled("llava-mod", resume_from_checkpoint=checkpoint, output_dir=folder, **flags)
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert [entry["balance"] >= 1 for entry in log if "loss" in entry] == [True] * 3
    whole, resumed = (load_model(str(each / "student")) for each in (tmp_path / "run", folder))
    for (name, mine), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert resumed.model.layers[0].mlp.router.calls == whole.model.layers[0].mlp.router.calls == 6


@pytest.mark.parametrize(("flags", "message"), [
    (dict(student="experts:four@x"), "expected --student experts:4@STUDENT"),
    (dict(student="experts:4"), "expected --student experts:4@STUDENT"),
    (dict(student="experts:4@x", lora_rank=2), "no adapters for experts"),
    (dict(lora_rank=2, trainable="*"), "leave --trainable out"),
    (dict(student="experts:4@x", gradient_checkpointing="true"), "routers would draw other"),
    (dict(trainable="*.experts.*"), "no parameter of LlamaForCausalLM matches"),
])  # fmt: skip
def test_flags_that_do_not_fit(distilled, flags, message):
    with pytest.raises(ValueError, match=message):
        distilled("llava-mod", **flags)


def test_folders_of_mixtures(llama, tmp_path):
    model = mixtures.make_mixtures(llama(2, tie_word_embeddings=True), 3)
    ids = torch.arange(30).view(2, 15)
    model.save_pretrained(tmp_path)
    assert not mixtures.is_marked(tmp_path)
    mixtures.mark(tmp_path)
    assert mixtures.is_marked(tmp_path)
    again = mixtures.load(tmp_path)
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    half = mixtures.load(tmp_path, torch.bfloat16)
    assert half.model.layers[0].mlp.experts[0].up_proj.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="has mixtures of experts already"):
        mixtures.make_mixtures(again, 2)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="does not hold the weights of its configuration"):
        mixtures.load(tmp_path)
