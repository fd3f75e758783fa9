"""DB-LLM's loss against closed forms and float64, and what becomes of a model's layers."""

import math

import pytest
import torch
from torch import nn

from stillhouse import ops
from stillhouse.methods.compression import (
    EntropyWeightedLoss,
    entropy_weighted_kd,
    freeze_fdb_,
    quantize_fdb_,
)
from stillhouse.methods.compression.entropy_weighting import _weights
from stillhouse.nn import FDBLinear, FDBWeight
from stillhouse.nn.surgery import train_only
from stillhouse.train import LogitRows, RowIndex, Stage, Taught, run_stages
from stillhouse.train.head import Head


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 2, 5, 17, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def plain(student, teacher, gamma, normalize=True, temperature=1.0):
    """The definition, row by row: cross-entropy and detached weight."""
    q, p = (each / temperature for each in (student, teacher))
    q, p = q.log_softmax(-1), p.log_softmax(-1)
    entropies = [-(x.exp() * x).sum(-1).detach() for x in (p, q)]
    weight = entropies[0] ** gamma * entropies[1] ** (1 - gamma)
    if normalize:
        weight = weight / weight.mean()
    return -(p.exp() * q).sum(-1), weight


def rows(student, teacher):
    position = torch.arange(len(student))
    index = RowIndex(row=position, target=position % 3, sequence=position)
    return LogitRows(student, index), LogitRows(teacher, index)


# The loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_the_definition(logits, gamma, normalize):
    student, teacher = logits
    loss = entropy_weighted_kd(student, teacher, gamma, normalize=normalize, temperature=1.7)
    value, weight = plain(student, teacher, gamma, normalize, 1.7)
    torch.testing.assert_close(loss, (value * weight).mean())
    (found,) = torch.autograd.grad(loss, student)
    (expected,) = torch.autograd.grad((value * weight).mean(), student)
    torch.testing.assert_close(found, expected)


def test_the_weight_is_a_constant_for_the_gradient(logits):
    student, teacher = logits
    (found,) = torch.autograd.grad(entropy_weighted_kd(student, teacher), student)
    _, weight = plain(student, teacher, 0.5)
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(found, weight[..., None] * (q - p) / 10)


def test_equal_entropies_are_plain_cross_entropy(logits):
    """gamma = 0 with one student entropy for all rows: the weights are all 1."""
    _, teacher = logits
    row = torch.linspace(-1, 2, 17, dtype=torch.float64)
    student = torch.stack([row.roll(shift) for shift in range(10)]).view(2, 5, 17)
    found = entropy_weighted_kd(student, teacher, gamma=0.0)
    expected = ops.divergence(student, teacher, "soft_cross_entropy").mean()
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(entropy_weighted_kd(student, teacher, gamma=1.0), expected)


def test_normalised_weights_average_one(logits):
    student, teacher = logits
    mask = torch.arange(10).view(2, 5) % 3 > 0
    _, stats = ops.divergence(student, teacher, "soft_cross_entropy", return_stats=True, mask=mask)
    weight = _weights(stats, 0.5, True, mask)
    assert weight[mask].mean().item() == pytest.approx(1)
    assert not weight[~mask].any()


def test_two_rows_by_hand():
    """Teacher entropies ln 2 and ln 4, the student's ln 4 twice: weights 2^(1/2) apart."""
    teacher = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf], [0.0] * 4], dtype=torch.float64)
    student = torch.zeros(2, 4, dtype=torch.float64)
    loss = entropy_weighted_kd(student, teacher, gamma=0.5, normalize=False)
    weights = [math.sqrt(math.log(2) * math.log(4)), math.log(4)]
    assert loss.item() == pytest.approx(sum(weights) / 2 * math.log(4))


def test_masked_rows_do_not_count(logits):
    student, teacher = logits
    mask = torch.tensor([[True] * 3 + [False] * 2, [False] * 5])
    loss = entropy_weighted_kd(student, teacher, mask=mask)
    torch.testing.assert_close(loss, entropy_weighted_kd(student[0, :3], teacher[0, :3]))
    assert torch.autograd.grad(loss, student)[0][~mask].abs().max() == 0
    nothing = entropy_weighted_kd(student, teacher, mask=torch.zeros_like(mask))
    assert nothing == 0
    assert torch.autograd.grad(nothing, student)[0].abs().max() == 0


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_rows_without_entropy(gamma):
    sure = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, 0.0, 0.0]], dtype=torch.float64)
    student = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    loss = entropy_weighted_kd(student, sure, gamma)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    if gamma:
        assert not student.grad[0].any()
    certain = entropy_weighted_kd(student, sure[:1].expand(2, 3), 1.0)
    assert certain == 0


def test_bad_input(logits):
    student, teacher = logits
    for gamma in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\]"):
            entropy_weighted_kd(student, teacher, gamma)
        with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\]"):
            EntropyWeightedLoss(gamma)
    with pytest.raises(ValueError, match="17"):
        entropy_weighted_kd(student, teacher[..., :16])
    with pytest.raises(ValueError, match="detach its logits"):
        entropy_weighted_kd(teacher, student)
    with pytest.raises(ValueError, match="label_weight is a share"):
        EntropyWeightedLoss(label_weight=1.5)
    with pytest.raises(ValueError, match="compares with a teacher"):
        EntropyWeightedLoss()(rows(student[0], teacher[0])[0], None, {})


# The objective ------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_weight", [0.0, 0.25])
def test_the_objective_is_the_function(logits, label_weight):
    student, teacher = (side.flatten(0, 1) for side in logits)
    objective = EntropyWeightedLoss(0.3, temperature=2.0, label_weight=label_weight)
    parts = objective(*rows(student, teacher), {})
    expected = entropy_weighted_kd(student, teacher, 0.3, temperature=2.0)
    labels = torch.nn.functional.cross_entropy(student, torch.arange(10) % 3)
    expected = (1 - label_weight) * expected + label_weight * labels
    torch.testing.assert_close(parts["loss"], expected)
    slopes = [torch.autograd.grad(each, logits[0])[0] for each in (parts["loss"], expected)]
    torch.testing.assert_close(*slopes)
    _, weight = plain(student, teacher, 0.3, temperature=2.0)
    torch.testing.assert_close(parts["weight_spread"], weight.std(correction=0))
    assert 0 < parts["acceptance"] < 1


@pytest.mark.parametrize("label_weight", [0.0, 0.25])
def test_from_hidden_states_it_is_the_same(label_weight):
    """Through `ops.linear_divergence`, with the gradient of hidden states and head."""
    torch.manual_seed(0)
    heads = [nn.Linear(12, 17).double() for _ in range(2)]
    hidden = torch.randn(10, 12, dtype=torch.float64, requires_grad=True)
    heads[1].requires_grad_(False)
    other = torch.randn(10, 12, dtype=torch.float64)
    index = rows(hidden, other)[0].index
    objective = EntropyWeightedLoss(label_weight=label_weight)
    linear = [
        LogitRows(None, index, states, Head(head, head.forward))
        for states, head in zip((hidden, other), heads, strict=True)
    ]
    found = objective(*linear, {})["loss"]
    expected = objective(*rows(heads[0](hidden), heads[1](other).detach()), {})["loss"]
    torch.testing.assert_close(found, expected)
    arguments = hidden, heads[0].weight, heads[0].bias
    slopes = [torch.autograd.grad(each, arguments) for each in (found, expected)]
    for mine, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_denominator_shares_the_mean(logits):
    student, teacher = (side.detach().flatten(0, 1) for side in logits)
    whole = EntropyWeightedLoss(normalize=False)(*rows(student, teacher), {})["loss"]
    parts = [
        EntropyWeightedLoss(normalize=False)(*rows(student[part], teacher[part]), batch)["loss"]
        for part, batch in ((slice(0, 3), {"denominator": 10}), (slice(3, 10), {"denominator": 10}))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_padded_columns_are_left_out(logits):
    student, teacher = (side.detach().flatten(0, 1) for side in logits)
    whole = EntropyWeightedLoss()(*rows(student[:, :11], teacher[:, :11]), {})
    padded = EntropyWeightedLoss()(*rows(student, teacher[:, :16]), {"vocab_size": 11})
    for name, value in whole.items():
        torch.testing.assert_close(padded[name], value)


def test_a_stored_teacher_of_all_columns_is_the_teacher(logits):
    student, teacher = (side.detach().flatten(0, 1).float() for side in logits)
    given = rows(student, teacher)
    stored = ops.SparseTeacher.from_logits(teacher, k=17)
    found = EntropyWeightedLoss()(given[0], stored, {})["loss"]
    torch.testing.assert_close(found, EntropyWeightedLoss()(*given, {})["loss"], rtol=1e-4, atol=0)


def test_no_rows_give_zero():
    student = torch.zeros(0, 5, requires_grad=True)
    parts = EntropyWeightedLoss(label_weight=0.5)(*rows(student * 1, torch.zeros(0, 5)), {})
    parts["loss"].backward()
    assert parts["loss"] == parts["weight_spread"] == 0


# Models -------------------------------------------------------------------------------------------


def test_every_linear_layer_but_the_head(llama):
    model = llama()
    before = {name: each.clone() for name, each in model.named_parameters()}
    report = quantize_fdb_(model, 16, method="paper")
    assert len(report.layers) == 2 * 7
    assert not any("lm_head" in layer.path for layer in report.layers)
    assert report.bits_per_weight == 4
    for layer in report.layers:
        weight = before[f"{layer.path}.weight"]
        fdb = FDBWeight.from_dense(weight, 16, "paper")
        mse = (fdb.dequantize() - weight).square().mean()
        assert layer.mse == pytest.approx(mse.item(), rel=1e-4)
        assert layer.relative_error == pytest.approx(
            (mse / weight.square().mean()).item(), rel=1e-4
        )
        assert layer.density == pytest.approx(fdb.density().tolist())
        assert torch.equal(model.get_submodule(layer.path).latent, weight)
    quantized = sum(layer.weights for layer in report.layers)
    kept = sum(each.numel() for each in before.values()) - quantized
    assert report.bytes_before == 4 * (kept + quantized)
    # Rows of 32 and of 48 columns: one word and two, and a scale for each 16.
    rows_of = {32: 0, 48: 0}
    for layer in report.layers:
        weight = before[f"{layer.path}.weight"]
        rows_of[weight.shape[1]] += len(weight)
    assert report.bytes_after == 4 * kept + rows_of[32] * 2 * (4 + 4) + rows_of[48] * 2 * (8 + 6)
    freeze_fdb_(model)
    state = model.state_dict()
    assert sum(each.numel() * each.element_size() for each in state.values()) == report.bytes_after


def test_words_that_are_skipped(llama):
    model = llama()
    report = quantize_fdb_(model, 16, skip=("lm_head", "self_attn", "layers.0"))
    paths = [layer.path for layer in report.layers]
    assert paths == [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]


def test_the_scales_alone_learn(llama):
    teacher, model = llama(), llama()
    quantize_fdb_(model, 16)
    train_only(model, "*.change")
    before = {name: each.clone() for name, each in model.named_parameters()}
    ids = torch.randint(200, (4, 16))
    batch = {"input_ids": ids, "labels": ids}
    taught = Taught(EntropyWeightedLoss(), teacher)
    history = run_stages(model, [Stage("s", taught, 30, parameters="*.change", data=[batch])])
    assert history[-1]["loss"] < history[0]["loss"]
    moved = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert moved == {name for name in before if name.endswith(".change")}


def test_a_tied_head_is_not_quantized(llama):
    tied = llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head shares its weight .* name it in skip"):
        quantize_fdb_(tied, 16, skip=())
    assert not any(isinstance(module, FDBLinear) for module in tied.modules())


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (64, {}, r"model.layers.0.self_attn.q_proj: 32 columns are no multiple of group_size 64"),
        (16, {"skip": ("layers", "lm_head")}, "no module of LlamaForCausalLM"),
        (16, {"method": "rtn"}, "q_proj: method must be one of paper, mse, ls"),
    ],
)
def test_models_that_cannot_be_quantized(llama, group, options, message):
    model = llama()
    with pytest.raises(ValueError, match=message):
        quantize_fdb_(model, group, **options)
    assert not any(isinstance(module, FDBLinear) for module in model.modules())
    with pytest.raises(ValueError, match=r"FDBLinear\.from_linear"):
        quantize_fdb_(nn.Linear(64, 64))


def test_a_weight_that_is_not_finite_names_its_layer(llama):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj: .* not finite"):
        quantize_fdb_(model, 16)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
