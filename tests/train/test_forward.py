"""Logits of the supervised rows equal those rows of the model's plain forward."""

import pytest
import torch

from stillhouse.train import LogitRows, row_divergence, row_loss, supervised_rows
from stillhouse.train.forward import FrozenTeacher, RowForward


def gemma2(sizes):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **sizes,
        num_hidden_layers=2,
        head_dim=8,
        sliding_window=8,
        final_logit_softcapping=2.0,
    )
    config.initializer_range = 0.3
    return Gemma2ForCausalLM(config).eval()


def cohere(sizes):
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        **sizes,
        num_hidden_layers=1,
        logit_scale=0.25,
    )
    return CohereForCausalLM(config).eval()


def check(model, batch):
    index = supervised_rows(batch["labels"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    plain = model(**inputs).logits
    rows = RowForward(model)(model, batch, index)
    expected = plain.reshape(-1, plain.shape[-1])[index.row]
    assert rows.logits.shape == (index.row.numel(), plain.shape[-1])
    torch.testing.assert_close(rows.logits, expected, rtol=1e-5, atol=1e-5)
    # The hook is silent once the rows are out.
    torch.testing.assert_close(model(**inputs).logits, plain, rtol=0, atol=0)
    return rows


def test_llama(llama, batch):
    model = llama()
    rows = check(model, batch)
    torch.testing.assert_close(rows.head(rows.hidden), rows.logits)


def test_soft_cap(sizes, batch):
    rows = check(gemma2(sizes), batch)
    assert rows.logits.abs().max() <= 2


def test_logit_scale(sizes, batch):
    check(cohere(sizes), batch)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_adapters(llama, batch, targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(llama(), config).eval()
    check(model, batch)


def test_smollm2(batch):
    from stillhouse import data
    from stillhouse.train.models import load_model

    try:
        path = data.smollm2()
    except data.DataUnavailable as error:
        pytest.skip(str(error))
    check(load_model(str(path), "float32").eval(), batch)


def test_gradient_is_that_of_the_full_logits(llama, batch):
    """The loss form, in place over the rows, against float64 torch on all of [B, T, V]."""
    teacher, model, plain = llama(3, seed=1), llama(), llama().double()
    index = supervised_rows(batch["labels"])
    loss, _ = row_loss(
        RowForward(model)(model, batch, index),
        FrozenTeacher(teacher)(batch, index),
        "forward_kl",
        {"denominator": 10},
        label_weight=0.25,
    )
    loss.backward()

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        target = teacher.double()(**inputs).logits[:, :-1].log_softmax(-1)
    ours = plain(**inputs).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    kl = (target.exp() * (target - ours)).sum(-1)
    nll = -ours.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    expected = (0.75 * kl + 0.25 * nll)[kept].sum() / 10
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_teacher_is_frozen(llama, batch):
    teacher = FrozenTeacher(llama().train())
    rows = teacher(batch, supervised_rows(batch["labels"]))
    assert not teacher.model.training
    assert not rows.logits.requires_grad
    assert not any(each.requires_grad for each in teacher.model.parameters())


def test_a_model_without_a_head(llama):
    with pytest.raises(ValueError, match="LlamaModel has no output head"):
        RowForward(llama().model)


def test_a_model_that_goes_round_its_head(llama, batch):
    model = llama()
    forward = RowForward(model)
    with pytest.raises(ValueError, match="did not call its output head"):
        forward(
            lambda **inputs: model.model(inputs["input_ids"]),
            batch,
            supervised_rows(batch["labels"]),
        )


def test_rows_of_unlike_batches_are_refused(llama, batch):
    index = supervised_rows(batch["labels"])
    rows = LogitRows(torch.zeros(index.row.numel(), 5), index)
    shorter = LogitRows(torch.zeros(2, 5), type(index)(*(each[:2] for each in index)))
    with pytest.raises(ValueError, match="supervised rows"):
        row_divergence(rows, shorter)
