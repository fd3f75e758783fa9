"""An objective and a teacher as the loss of a stage, against the loop by hand."""

import copy

import pytest
import torch
from torch import nn

from stillhouse.methods.language import TAIDLoss
from stillhouse.train import DivergenceObjective, Stage, Taught, run_stages


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(200, (3, 12), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def kl(student, teacher, given):
    logits = [model(given["input_ids"]).logits[:, 3:-1] for model in (student, teacher)]
    q, p = (each.log_softmax(-1) for each in logits)
    return (p.exp() * (p - q)).sum(-1).mean()


def test_it_is_the_loss_by_hand(llama):
    teacher, student = llama(2, seed=1), llama(1, seed=2)
    want = kl(student, teacher, batch())
    found = Taught(DivergenceObjective("forward_kl"), teacher)(student, batch())["loss"]
    torch.testing.assert_close(found, want)
    slopes = [torch.autograd.grad(each, student.parameters()) for each in (found, want)]
    for mine, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("headless", [False, True])
def test_the_teacher_is_only_read(llama, headless):
    class Plain(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.drop = model, nn.Dropout(0.5)

        def forward(self, ids):
            assert not torch.is_grad_enabled()
            return self.drop(self.model(ids).logits)

    student = llama(1, seed=2)
    teacher = llama(2, seed=1, attention_dropout=0.5).train()
    want = kl(student, copy.deepcopy(teacher).eval(), batch())
    given = Plain(teacher).train() if headless else teacher
    found = Taught(DivergenceObjective("forward_kl"), given)(student, batch())["loss"]
    torch.testing.assert_close(found, want)
    assert not given.training


def test_columns_that_do_not_count(llama):
    teacher, student = llama(1, vocab_size=264, seed=1), llama(1, seed=2)
    taught = Taught(DivergenceObjective("forward_kl"), teacher, vocab_size=259)
    q = student(batch()["input_ids"]).logits[:, 3:-1].log_softmax(-1)
    p = teacher(batch()["input_ids"]).logits[:, 3:-1, :259].log_softmax(-1)
    want = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(taught(student, batch())["loss"], want)


def test_schedules_move_and_are_kept(llama, tmp_path):
    teacher = llama(2, seed=1)

    class Cut(Exception):
        pass

    def stage(objective, cut=None):
        def data(step):
            if step == cut:
                raise Cut
            return batch(step)

        return [Stage("taid", Taught(objective, teacher), 6, data=data, lr=1e-3)]

    whole, resumed = TAIDLoss(adaptive=False), TAIDLoss(adaptive=False)
    history = run_stages(llama(1, seed=2), stage(whole))
    assert [row["t"] for row in history] == pytest.approx([0.4, 0.4, 0.6, 0.7, 0.8, 0.9])
    assert whole.t == 1.0
    options = dict(resume=tmp_path / "run", save_every=2)
    with pytest.raises(Cut):
        run_stages(llama(1, seed=2), stage(TAIDLoss(adaptive=False), cut=4), **options)
    found = run_stages(llama(1, seed=2), stage(resumed), **options)
    assert [row["t"] for row in found] == [row["t"] for row in history]
    assert resumed.t == 1.0


def test_the_objectives_parameters_learn(llama):
    class Scaled(nn.Module):
        needs_teacher = False

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, student, teacher, given):
            assert teacher is None
            return {"loss": (self.scale * student.logits).square().mean()}

        def update(self, stats, step, total_steps):
            self.seen = stats["loss"], step, total_steps

    objective = Scaled()
    history = run_stages(llama(1), [Stage("scale", Taught(objective), 2, data=[batch()], lr=0.1)])
    assert objective.scale < 1
    assert objective.seen == (history[-1]["loss"], 2, 2)


def test_students_are_told_of(llama):
    seen = []

    class Looking(DivergenceObjective):
        def use_student(self, model):
            seen.append(model)

    taught = Taught(Looking("cross_entropy"))
    first, second = llama(1), llama(1)
    for model in (first, first, second):
        taught(model, batch())
    assert [each is first for each in seen] == [True, True, False]


def test_bad_input(llama):
    with pytest.raises(ValueError, match="DivergenceObjective compares with a teacher"):
        Taught(DivergenceObjective("forward_kl"))
    taught = Taught(DivergenceObjective("cross_entropy"))
    with pytest.raises(ValueError, match="a batch needs labels, this one has input_ids"):
        taught(llama(1), {"input_ids": torch.zeros(1, 2, dtype=torch.int64)})
