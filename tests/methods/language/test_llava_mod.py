"""LLaVA-MoD: imitation in closed form and against whole logits in float64, what a mixture adds to
it, and which rows count."""

import copy
import math

import pytest
import torch
from torch import nn

from stillhouse.methods.language import LLaVAMoDLoss
from stillhouse.nn.moe import MoE, RouterInfo, Switch, TopK, router_balance, upcycle_
from stillhouse.train import (
    LogitRows,
    RowIndex,
    Stage,
    Taught,
    run_stages,
    supervised_rows,
)
from stillhouse.train.forward import FrozenTeacher, RowForward

DOUBLE = torch.float64


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 7, 11, generator=generator, dtype=DOUBLE)
    return student.requires_grad_(), teacher


def rows(student, teacher, targets=None):
    position = torch.arange(len(student))
    targets = torch.zeros_like(position) if targets is None else targets
    index = RowIndex(row=position, target=targets, sequence=position)
    return LogitRows(student * 1, index), LogitRows(teacher, index)


def gradient(loss, student):
    return torch.autograd.grad(loss, student)[0]


def mixture(llama, layers=3, **options):
    model = llama(layers)
    upcycle_(model, TopK(2, noise="gumbel"), seed=5, **options)
    return model


def of_batch(ids, prompt=0):
    labels = ids.clone()
    labels[:, : prompt or 1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


# Imitation ----------------------------------------------------------------------------------------


def test_mimic_is_soft_cross_entropy(logits):
    student, teacher = logits
    parts = LLaVAMoDLoss("mimic")(*rows(student, teacher), {})
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(parts["loss"], -(p * q.log()).sum(-1).mean())
    torch.testing.assert_close(parts["kl"], (p * (p / q).log()).sum(-1).mean().detach())
    torch.testing.assert_close(gradient(parts["loss"], student), (q - p) / 7)


def test_a_perfect_imitation_ends_at_the_teachers_entropy(logits):
    _, teacher = logits
    parts = LLaVAMoDLoss("mimic")(*rows(teacher, teacher), {})
    p = teacher.softmax(-1)
    torch.testing.assert_close(parts["loss"], -(p * p.log()).sum(-1).mean())
    assert abs(parts["kl"]) < 1e-12


def test_mimic_ce_adds_the_labels_in_full(logits):
    student, teacher = logits
    targets = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    parts = LLaVAMoDLoss("mimic_ce")(*rows(student, teacher, targets), {})
    p, q = teacher.softmax(-1), student.softmax(-1)
    labels = nn.functional.cross_entropy(student, targets)
    torch.testing.assert_close(parts["loss"], -(p * q.log()).sum(-1).mean() + labels)
    one = nn.functional.one_hot(targets, 11)
    torch.testing.assert_close(gradient(parts["loss"], student), (2 * q - p - one) / 7)


def test_one_response_token_has_the_row_before_it(llama):
    """The released code pairs row i with label i: that row would be the token's own."""
    teacher, student = llama(2, seed=1).double(), llama(1, seed=2).double()
    ids = torch.arange(20, 30)[None]
    batch = of_batch(ids, prompt=9)
    loss = Taught(LLaVAMoDLoss("mimic"), teacher)(student, batch)["loss"]
    with torch.no_grad():
        p, q = (model(ids).logits[0, 8].softmax(-1) for model in (teacher, student))
    torch.testing.assert_close(loss.detach(), -(p * q.log()).sum())


def test_rows_without_a_label_contribute_nothing(llama):
    teacher, student = llama(2, seed=1), llama(1, seed=2)
    taught = Taught(LLaVAMoDLoss("mimic_ce"), teacher)
    ids = torch.arange(40).view(2, 20)
    batch = of_batch(ids, prompt=12)
    hidden = []
    student.model.norm.register_forward_hook(lambda module, args, out: hidden.append(out))
    loss = taught(student, batch)["loss"]
    slope = torch.autograd.grad(loss, hidden[-1])[0]
    counts = torch.zeros(2, 20, dtype=torch.bool)
    counts[:, 11:19] = True
    assert slope[~counts].abs().max() == 0
    assert slope[counts].abs().amax(-1).min() > 0
    batch["labels"] = torch.full_like(ids, -100)
    assert taught(student, batch)["loss"] == 0


def test_padded_columns_are_left_out(logits):
    student, teacher = (each.detach() for each in logits)
    wide = torch.cat([student, torch.full((7, 3), 50.0, dtype=DOUBLE)], 1)
    other = torch.cat([teacher, torch.full((7, 5), 50.0, dtype=DOUBLE)], 1)
    want = LLaVAMoDLoss()(*rows(student, teacher), {})["loss"]
    found = LLaVAMoDLoss()(*rows(wide, other), {"vocab_size": 11})["loss"]
    torch.testing.assert_close(found, want)
    with pytest.raises(ValueError, match="14"):
        LLaVAMoDLoss()(*rows(wide, other), {})


# Mixtures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["alternate", "first_half", "second_half", "all", [2]])
def test_an_upcycled_student_is_the_dense_one(llama, layers):
    dense = llama(4)
    student = copy.deepcopy(dense)
    upcycle_(student, TopK(2, noise="gumbel"), layers=layers)
    ids = torch.arange(60).view(3, 20)
    with torch.no_grad():
        assert (student.eval()(ids).logits - dense(ids).logits).abs().max() < 1e-5
        student.double(), dense.double()
        difference = student(ids).logits - dense(ids).logits
    assert difference.abs().max() < 1e-6


def test_balance_is_one_when_even_and_e_when_collapsed():
    for peak, choices, want in ((0.0, [0, 1, 2, 3], 1.0), (1e4, [0, 0, 0, 0], 4.0)):
        probs = torch.tensor([[peak, 0, 0, 0]] * 4).softmax(-1)
        index = torch.tensor([[e, (e + 1) % 4] for e in choices])
        load = index.flatten().bincount(minlength=4)
        info = RouterInfo(probs.log(), probs, index, probs.gather(1, index), load, torch.tensor(0))
        mixture = MoE([nn.Linear(2, 2) for _ in range(4)], TopK(2))
        mixture.info = info
        objective = LLaVAMoDLoss("mimic", balance=0.25)
        objective.use_student(nn.Sequential(mixture, nn.Linear(2, 2)))
        same = torch.zeros(3, 5, requires_grad=True)
        parts = objective(*rows(same, torch.zeros(3, 5)), {})
        assert parts["balance"] == pytest.approx(want)
        assert parts["loss"].item() == pytest.approx(math.log(5) + 0.25 * want)
        assert parts["largest_load"] == load.max() / 2


@pytest.mark.parametrize("stage", ["mimic", "mimic_ce"])
def test_lambda_counts_once_for_every_layer(llama, stage):
    """Their kd_lm adds it twice."""
    student, teacher = mixture(llama, 5), llama(2, seed=9)
    batch = of_batch(torch.arange(60).view(3, 20))
    plain, weighted = (
        Taught(LLaVAMoDLoss(stage, balance=each), teacher)(student, batch) for each in (0.0, 0.5)
    )
    infos = [layer.mlp.info for layer in student.model.layers if isinstance(layer.mlp, MoE)]
    assert len(infos) == 3
    aux = sum(router_balance(info, "gshard") for info in infos)
    torch.testing.assert_close(weighted["loss"] - plain["loss"], 0.5 * aux, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weighted["balance"], aux.detach())
    share = [info.load.max() / info.load.float().mean() for info in infos]
    torch.testing.assert_close(weighted["largest_load"], max(share))


def test_balance_and_kd_reach_the_router(llama):
    student, teacher = mixture(llama, 1), llama(2, seed=9)
    batch = of_batch(torch.arange(60).view(3, 20))
    weight = student.model.layers[0].mlp.router.weight
    slopes = []
    for balance in (0.0, 1.0):
        loss = Taught(LLaVAMoDLoss("mimic", balance=balance), teacher)(student, batch)["loss"]
        slopes.append(torch.autograd.grad(loss, weight)[0])
    # Copies of one expert: where they are equal the teacher cannot yet say which is better.
    assert slopes[0].abs().max() < 1e-6
    assert slopes[1].abs().max() > 1e-4
    with torch.no_grad():
        student.model.layers[0].mlp.experts[0].up_proj.weight.mul_(1.1)
    loss = Taught(LLaVAMoDLoss("mimic", balance=0.0), teacher)(student, batch)["loss"]
    assert torch.autograd.grad(loss, weight)[0].abs().max() > 1e-4


def test_stages_learn_what_they_say(llama):
    """Dense to dense, dense to sparse: only experts and routers move in the second."""
    teacher, student = llama(2, seed=1), llama(2, seed=2)
    before = copy.deepcopy(student)
    batch = of_batch(torch.arange(60).view(3, 20))
    taught = Taught(LLaVAMoDLoss("mimic"), teacher)
    seen = {}

    def upcycle(model):
        upcycle_(model, TopK(2, noise="gumbel"))
        seen.update({name: each.detach().clone() for name, each in model.named_parameters()})

    history = run_stages(
        student,
        [
            Stage("dense to dense", taught, 3, data=[batch], lr=1e-3),
            Stage(
                "dense to sparse",
                taught,
                3,
                parameters=["*.experts.*", "*.router.*"],
                data=[batch],
                lr=1e-3,
                prepare=upcycle,
            ),
        ],
    )
    assert not torch.equal(student.lm_head.weight, before.lm_head.weight)
    moved = {n for n, each in student.named_parameters() if not torch.equal(each, seen[n])}
    assert moved == {n for n in seen if ".experts." in n or ".router." in n}
    assert "balance" not in history[0]
    assert history[3]["balance"] >= 1
    assert history[-1]["kl"] < history[0]["kl"]


def test_capacity_drops_late_tokens():
    """Four tokens of one choice with room for one: the others keep the residual alone; with second
    choices of their own they survive with weight one."""
    experts = [nn.Linear(4, 4, bias=False) for _ in range(4)]
    one = MoE(experts, Switch(), capacity=1.0)
    two = MoE(experts, TopK(2), capacity=0.5)
    with torch.no_grad():
        one.router.weight.copy_(torch.eye(4)), two.router.weight.copy_(torch.eye(4))
        same = torch.tensor([[5.0, 0, 0, 0]] * 4)
        y = one(same)
        assert y[0].abs().max() > 0
        assert y[1:].abs().max() == 0
        common = torch.tensor([[5.0, 4, 0, 0]] * 4)
        y = two(common)
        assert y[1:].abs().max() == 0
        apart = torch.tensor([[5.0, 4, 0, 0], [5, 0, 4, 0], [5, 0, 0, 4]])
        two.capacity = 2 / 3  # ceil(2/3 * 3 * 2 / 4) = 1
        y = two(apart)
    for token, expert in ((1, 2), (2, 3)):
        torch.testing.assert_close(y[token], experts[expert](apart[token]))
    assert int(two.info.dropped) == 2


def test_micro_batches_add_up(llama):
    student, teacher = mixture(llama, 2), llama(2, seed=9)
    for module in student.modules():
        if isinstance(module, TopK):
            module.noise = 0.0  # micro-batches would draw other numbers
    objective = LLaVAMoDLoss("mimic_ce", balance=0.5)
    objective.use_student(student)
    forward, frozen = RowForward(student), FrozenTeacher(teacher)
    ids = torch.arange(100).view(5, 20)
    total, aux, plain = 0.0, 0.0, 0.0
    for part in (ids[:2], ids[2:]):
        batch = of_batch(part) | {"denominator": torch.tensor(95.0)}
        index = supervised_rows(batch["labels"])
        said = frozen(batch, index)
        loss = lambda rows, batch=batch, said=said: objective(rows, said, batch)  # noqa: E731
        parts = forward(student, batch, index, loss)
        total += parts["loss"]
        aux += parts["balance"] * len(part) / 5
        objective.balance = 0.0
        plain += forward(student, batch, index, loss)["loss"]
        objective.balance = 0.5
    torch.testing.assert_close(total, plain + 0.5 * aux, rtol=1e-5, atol=1e-6)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stage="align"), "stage must be mimic, mimic_ce, preference, got 'align'"),
        (dict(balance=-0.1), "balance is a weight, at least 0"),
        (dict(balance=math.nan), "balance is a weight"),
        (dict(kind="ipo"), "are of 'preference', not of 'mimic'"),
        (dict(stage="mimic_ce", beta=0.2), "are of 'preference', not of 'mimic_ce'"),
        (dict(stage="preference", beta=0.0), "beta must be a positive number"),
        (dict(stage="preference", kind="dpo"), "kind must be sigmoid"),
        (dict(stage="preference", kind="sigmoid", label_smoothing=0.5), "label_smoothing"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LLaVAMoDLoss(**options)


@pytest.mark.parametrize(("options", "message"), [
    (dict(router=TopK(5)), "expected 1 <= k <= 4 experts"),
    (dict(experts=0), "expected at least one expert"),
    (dict(layers="sparse"), "layers must be alternate"),
    (dict(layers=[7]), "layer 7 does not exist: the model has 2 blocks"),
    (dict(match="ffn"), "no module of LlamaDecoderLayer matches 'ffn'"),
    (dict(capacity=0.0), "capacity is a positive factor"),
])  # fmt: skip
def test_students_that_cannot_be(llama, options, message):
    with pytest.raises(ValueError, match=message):
        upcycle_(llama(2), **(dict(router=TopK(2)) | options))
    with pytest.raises(ValueError, match="experts must have parameters of the same shapes"):
        MoE([nn.Linear(2, 2), nn.Linear(2, 3)], TopK(1))
