"""LLaVA-MoD's preferences: closed forms, whole logits in float64, and batches of pairs."""

import copy
import math

import numpy as np
import pytest
import torch

from stillhouse.methods.language import LLaVAMoDLoss, preference_batch
from stillhouse.nn.moe import TopK, router_balance, upcycle_
from stillhouse.train import LogitRows, RowIndex, Stage, Taught, run_stages
from stillhouse.train.examples import Example

DOUBLE = torch.float64


def example(ids, prompt):
    mask = np.arange(len(ids)) >= prompt
    return Example(np.asarray(ids, dtype=np.int32), mask)


@pytest.fixture
def pairs():
    """Three pairs, of unequal lengths."""
    generator = np.random.default_rng(0)
    preferred, other = [], []
    for length, prompt in ((9, 4), (7, 2), (6, 5)):
        head = generator.integers(0, 250, prompt)
        preferred.append(example([*head, *generator.integers(0, 250, length - prompt)], prompt))
        other.append(example([*head, *generator.integers(0, 250, length - prompt + 1)], prompt))
    return preferred, other


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    [
        ("sigmoid", math.log(2), -0.05),
        ("kto_pair", 0.5, -0.0125),
        ("hinge", 1.0, -0.1),
        ("ipo", 25.0, -10.0),
    ],
)
def test_where_student_and_teacher_agree(llama, pairs, kind, value, slope):
    model = llama(2).double()
    batch = preference_batch(*pairs)
    student = copy.deepcopy(model).train()
    parts = Taught(LLaVAMoDLoss("preference", kind=kind), model)(student, batch)
    assert parts["loss"].item() == pytest.approx(value, rel=1e-9)
    assert parts["margin"].abs() < 1e-9
    assert parts["token_margin"].abs() < 1e-9
    assert parts["student_accuracy"] == parts["reference_accuracy"]
    # d loss / d policy is the slope over the number of pairs, up for the preferred.
    head = student.lm_head.weight
    found = torch.autograd.grad(parts["loss"], head)[0]
    policy = by_hand(student, batch)
    weight = torch.tensor([[slope, -slope]] * 3, dtype=DOUBLE) / 3
    torch.testing.assert_close(found, torch.autograd.grad((weight * policy).sum(), head)[0])


def by_hand(model, batch):
    """[P, 2] sums over whole logits."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits = logits.log_softmax(-1)
    labels = batch["labels"][:, 1:]
    chosen = logits[:, :-1].gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    total = (chosen * (labels != -100)).sum(-1)
    return total.view(2, -1).T


def test_preference_against_whole_logits(llama, pairs):
    student, teacher = llama(1, seed=3).double(), llama(2, seed=4).double()
    batch = preference_batch(*pairs)
    options = dict(kind="sigmoid", beta=0.3, label_smoothing=0.1)
    parts = Taught(LLaVAMoDLoss("preference", **options), teacher)(student, batch)
    with torch.no_grad():
        policy, reference = by_hand(student, batch), by_hand(teacher, batch)
    d = (policy - reference)[:, 0] - (policy - reference)[:, 1]
    sigma = torch.sigmoid(0.3 * d)
    want = -(0.9 * sigma.log() + 0.1 * (1 - sigma).log()).mean()
    torch.testing.assert_close(parts["loss"].detach(), want)
    torch.testing.assert_close(parts["margin"], 0.3 * d.mean())
    assert parts["accuracy"] == (d > 0).double().mean()
    assert parts["student_accuracy"] == (policy[:, 0] > policy[:, 1]).double().mean()
    assert parts["reference_accuracy"] == (reference[:, 0] > reference[:, 1]).double().mean()
    counts = torch.tensor([[5, 6], [5, 6], [1, 2]])
    per_token = (policy - reference) / counts
    torch.testing.assert_close(parts["token_margin"], (per_token[:, 0] - per_token[:, 1]).mean())


@pytest.mark.parametrize("kind", ["sigmoid", "kto_pair", "hinge", "ipo"])
def test_a_step_prefers_the_preferred(llama, pairs, kind):
    teacher = llama(2, seed=4)
    student, batch = copy.deepcopy(teacher), preference_batch(*pairs)
    taught = Taught(LLaVAMoDLoss("preference", kind=kind), teacher)
    history = run_stages(student, [Stage("preference", taught, 4, data=[batch], lr=1e-3)])
    assert history[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert history[-1]["margin"] > 0.01
    with torch.no_grad():
        gain = by_hand(student, batch) - by_hand(teacher, batch)
    assert (gain[:, 0] - gain[:, 1]).mean() > 0.1
    assert history[-1]["preferred_reward"] > history[-1]["other_reward"]


def test_both_answers_have_a_balance(llama, pairs):
    student, teacher = llama(3), llama(2, seed=9)
    upcycle_(student, TopK(2, noise="gumbel"), seed=5)
    batch = preference_batch(*pairs)
    objective = LLaVAMoDLoss("preference", balance=0.5)
    parts = Taught(objective, teacher)(student, batch)
    objective.balance = 0.0
    plain = Taught(objective, teacher)(student, batch)
    aux = []
    for half in (slice(0, 3), slice(3, 6)):
        inputs = {name: batch[name][half] for name in ("input_ids", "attention_mask")}
        student(**inputs)
        aux += [router_balance(m.info, "gshard") for m in objective.mixtures]
    assert len(aux) == 4
    torch.testing.assert_close(parts["balance"], sum(aux).detach())
    torch.testing.assert_close(parts["loss"] - plain["loss"], 0.5 * sum(aux), rtol=1e-4, atol=1e-5)


def test_a_batch_of_pairs(pairs):
    batch = preference_batch(*pairs, padding=258)
    assert batch["pairs"] == 3
    assert batch["input_ids"].shape == (6, 10)
    for number, each in enumerate([*pairs[0], *pairs[1]]):
        n = len(each.input_ids)
        assert batch["input_ids"][number, :n].tolist() == each.input_ids.tolist()
        assert batch["input_ids"][number, n:].tolist() == [258] * (10 - n)
        assert (batch["labels"][number, :n] != -100).tolist() == each.loss_mask.tolist()
        assert batch["attention_mask"][number].sum() == n


def test_pairs_that_cannot_be(llama, pairs):
    preferred, other = pairs
    good, empty = preferred[0], example([1, 2, 3], 3)
    long = Example(np.arange(4), np.array([False, True]))
    for given, message in (
        (([], []), "as many of both responses, got 0 preferred ones and 0"),
        ((preferred, other[:2]), "got 3 preferred ones and 2 others"),
        (([good], [empty]), "pair 0 has an empty response"),
        (([long], [other[0]]), "pair 0: 4 tokens and a mask of 2"),
        ((preferred, other[::-1]), "pair 0 answers two different prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            preference_batch(*given)
    model, ids = llama(1), torch.arange(40).view(2, 20)
    plain = {"input_ids": ids, "labels": ids}
    taught = Taught(LLaVAMoDLoss("preference"), model)
    batch = preference_batch(*pairs)
    emptied = batch | {"labels": batch["labels"].clone()}
    emptied["labels"][4] = -100
    for given, message in (
        (plain, "make batches with preference_batch"),
        (batch | {"pairs": 2}, "expected 2 pairs, twice as many sequences"),
        (emptied, "pair 1 has an empty response"),
        (batch | {"denominator": 3}, "pairs do not count by the token"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            taught(model, given)
        assert "\n" not in str(raised.value)


def test_a_reference_with_a_gradient():
    student, teacher = torch.randn(2, 6, 11)
    index = RowIndex(torch.arange(6), torch.arange(6), torch.arange(6))
    batch = {"labels": torch.zeros(6, 2), "pairs": 3}
    given = LogitRows(student, index), LogitRows(teacher.requires_grad_(), index)
    with pytest.raises(ValueError, match="no gradient flows to the reference"):
        LLaVAMoDLoss("preference")(*given, batch)
    with pytest.raises(ValueError, match="a model's rows, got NoneType"):
        LLaVAMoDLoss("preference")(given[0], None, batch)
