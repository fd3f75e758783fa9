"""The supervised rows, and losses of them, equal those of the model's plain forward."""

import copy
import time

import pytest
import torch
import torch._dynamo.testing

from stillhouse import ops
from stillhouse.nn.moe import TopK, upcycle_
from stillhouse.train import LogitRows, row_divergence, row_loss, supervised_rows
from stillhouse.train.forward import FrozenTeacher, RowForward, row_forward
from stillhouse.train.head import PROBE, transform_of


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
    head = check(model, batch).head
    assert (head.scale, head.softcap) == (1, None)
    assert head.linear() == (model.lm_head.weight, None)


def test_soft_cap(sizes, batch):
    rows = check(gemma2(sizes), batch)
    assert rows.logits.abs().max() <= 2
    assert (rows.head.scale, rows.head.softcap) == (1, 2)


def test_logit_scale(sizes, batch):
    head = check(cohere(sizes), batch).head
    assert (head.scale, head.softcap) == (0.25, None)


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


def llama_of(sizes):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, num_hidden_layers=2)
    config.initializer_range = 0.3
    return LlamaForCausalLM(config).eval()


def shifting(sizes):
    """A model that does to its logits what nobody knows."""
    model = llama_of(sizes)
    plain = model.forward
    # Not only a scale and a cap: it depends on the column.
    shift = torch.linspace(-1, 1, sizes["vocab_size"])

    class Shifting(type(model)):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits + shift
            return output

    model.__class__ = Shifting
    assert plain is not model.forward
    return model


def with_adapters(sizes):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return peft.get_peft_model(llama_of(sizes), config).eval()


MODELS = [llama_of, gemma2, cohere, with_adapters, shifting]


@pytest.mark.filterwarnings("ignore:.*more to its logits")
@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_gradient_is_that_of_the_full_logits(make, sizes, batch):
    """The loss inside the forward against float64 torch on all of [B, T, V]."""
    torch.manual_seed(0)
    teacher, model = make(sizes), make(sizes)
    plain = copy.deepcopy(model).double()
    index = supervised_rows(batch["labels"])
    rows = FrozenTeacher(teacher)(batch, index)

    def compute(student):
        loss, stats = row_loss(student, rows, "jsd", {"denominator": 10}, label_weight=0.25)
        return {"loss": loss, "acceptance": stats.acceptance.mean()}

    parts = RowForward(model)(model, batch, index, compute)
    (3 * parts["loss"]).backward()

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        p = teacher.double()(**inputs).logits[:, :-1].softmax(-1)
    log_q = plain(**inputs).logits[:, :-1].log_softmax(-1)
    log_m = ((p + log_q.exp()) / 2).log()
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    jsd = (p * (p.log() - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2
    nll = -log_q.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    expected = (0.75 * jsd + 0.25 * nll)[kept].sum() / 10
    (3 * expected).backward()
    assert parts["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    acceptance = torch.minimum(p, log_q.exp()).sum(-1)[kept].mean().item()
    assert parts["acceptance"].item() == pytest.approx(acceptance, rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None
            continue
        torch.testing.assert_close(
            ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_unknown_logits_are_said_to_be_computed_whole(sizes, batch):
    model = shifting(sizes)
    with pytest.warns(UserWarning, match="Shifting does more to its logits"):
        rows = RowForward(model)(model, batch, supervised_rows(batch["labels"]))
    assert rows.head is None


@pytest.mark.parametrize("scale", [1.0, 0.125, 0.3, 0.0390625, 1 / 12])
@pytest.mark.parametrize("cap", [None, 30.0, 2.5])
def test_what_happens_to_logits_is_found_out(scale, cap):
    probe = torch.tensor(PROBE)
    seen = scale * probe if cap is None else cap * torch.tanh(scale * probe / cap)
    assert transform_of(probe, seen) == (pytest.approx(scale), cap and pytest.approx(cap))
    assert transform_of(probe, seen + 0.1) is None
    assert transform_of(probe, seen.bfloat16()) is None
    assert transform_of(probe, seen[:3]) is None
    assert transform_of(probe, probe.relu()) is None


def test_the_loss_needs_no_logits(llama, batch):
    model, index = llama(vocab_size=20_011), supervised_rows(batch["labels"])
    teacher = FrozenTeacher(llama(3, vocab_size=20_011, seed=1))
    forward = RowForward(model)

    def step():
        def compute(student):
            return {"loss": row_loss(student, teacher(batch, index), "jsd", {})[0]}

        forward(model, batch, index, compute)["loss"].backward()

    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    sizes = {abs(event.cpu_memory_usage) for event in profile.events()}
    logits = len(index.row) * 20_011 * 4
    assert logits not in sizes
    assert max(sizes) >= 20_011 * 32 * 4  # the head's gradient: the measurement sees such sizes


def test_a_compiled_model_leaves_the_loss_alone(llama, batch):
    """Two graphs, before the head and after it, however little of the loss can be compiled."""
    model, index = llama(), supervised_rows(batch["labels"])
    target = LogitRows(torch.randn(len(index.row), 259), index)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    forward, compiled = RowForward(model), torch.compile(model, backend=counter)

    def compute(rows):
        time.perf_counter()
        return {"loss": row_loss(rows, target, "jsd", {})[0]}

    for _ in range(3):
        got, want = (forward(m, batch, index, compute)["loss"] for m in (compiled, model))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert counter.frame_count == 2


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_loss_that_is_no_number_comes_out_as_it_is(llama, batch, value):
    model, index = llama(), supervised_rows(batch["labels"])
    parts = RowForward(model)(
        model, batch, index, lambda rows: {"loss": rows.hidden.sum() * 0 + value}
    )
    torch.testing.assert_close(parts["loss"], torch.tensor(value), equal_nan=True)


def test_random_numbers_are_those_of_the_plain_run(llama, batch):
    model, index = llama(attention_dropout=0.5).train(), supervised_rows(batch["labels"])
    forward = RowForward(model)
    torch.manual_seed(1)
    first = forward(model, batch, index).hidden
    torch.manual_seed(1)
    torch.testing.assert_close(forward(model, batch, index).hidden, first, rtol=0, atol=0)


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


def test_a_sparse_teacher_takes_the_place_of_rows(llama, batch):
    model, index = llama(), supervised_rows(batch["labels"])
    rows = RowForward(model)(model, batch, index)
    t = torch.randn(len(index.row), 259)
    sparse = ops.SparseTeacher.from_logits(t, k=259)
    torch.testing.assert_close(
        row_divergence(rows, sparse, "forward_kl"),
        row_divergence(rows, LogitRows(t, index), "forward_kl"),
        rtol=1e-5,
        atol=1e-6,
    )


def test_looking_at_the_head_draws_nothing(llama):
    """A router counts its draws: a resumed run, which looks again, would draw other numbers."""
    model = llama(2)
    upcycle_(model, TopK(2, noise="gumbel"), layers="all")
    model.train()
    ids = torch.arange(12)[None]
    row_forward(model)({"input_ids": ids}, supervised_rows(ids))
    assert [layer.mlp.router.calls for layer in model.model.layers] == [1, 1]
    assert model.training
