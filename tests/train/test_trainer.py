import copy
import math
import time

import pytest
import torch

from stillhouse.methods.language.taid import TAIDLoss
from stillhouse.train import DistillTrainer, DivergenceObjective
from stillhouse.train.examples import ExampleSet, collate
from stillhouse.train.metrics import summarize
from stillhouse.train.resumable import NonFiniteLoss


def train(model, training, examples, objective="forward_kl", **options):
    if isinstance(objective, str):
        objective = DivergenceObjective(objective)
    trainer = DistillTrainer(
        model, training, objective=objective, train_dataset=examples, **options
    )
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    return torch.cat([each.detach().float().reshape(-1) for each in trainer.model.parameters()])


def test_the_first_loss_by_hand(llama, arguments, examples):
    """The mean over the tokens of a step, in float64 torch on full logits."""
    teacher, student = llama(3, seed=1), llama()
    start = copy.deepcopy(student).double()
    everything = arguments(max_steps=1, per_device_train_batch_size=len(examples))
    trainer = train(student, everything, examples, teacher=copy.deepcopy(teacher))
    batch = collate(examples.examples)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        p = teacher.double()(**inputs).logits[:, :-1].log_softmax(-1)
        q = start(**inputs).logits[:, :-1].log_softmax(-1)
    kept = batch["labels"][:, 1:] != -100
    expected = (p.exp() * (p - q)).sum(-1)[kept].mean().item()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert trainer.tokens == kept.sum() == examples.targets


@pytest.mark.parametrize("objective", ["forward_kl", "cross_entropy"])
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        (dict(per_device_train_batch_size=2, gradient_accumulation_steps=4), 1e-5),
        (dict(per_device_train_batch_size=8, gradient_checkpointing=True), 1e-6),
        (dict(per_device_train_batch_size=8, bf16=True), 3e-2),
    ],
    ids=["accumulation", "checkpointing", "autocast"],
)
def test_the_same_loss(llama, arguments, examples, objective, changes, tolerance):
    """Unlike numbers of targets a micro-batch: a mean of means would be off."""
    teacher = llama(3, seed=1)
    plain = train(
        llama(), arguments(per_device_train_batch_size=8), examples, objective, teacher=teacher
    )
    other = train(llama(), arguments(**changes), examples, objective, teacher=teacher)
    assert losses(other) == pytest.approx(losses(plain), rel=tolerance)
    if tolerance < 1e-3:
        # Adam divides by the gradient's size: where that is nearly 0 the sign is rounding.
        differs = (weights(other) - weights(plain)).abs() > 1e-3
        assert differs.float().mean() < 1e-3


def test_adapters_train(llama, arguments, examples):
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    frozen = student.get_output_embeddings().weight.detach().clone()
    trainer = train(student, arguments(max_steps=6), examples, teacher=llama(3, seed=1))
    assert losses(trainer)[-1] < losses(trainer)[0]
    torch.testing.assert_close(student.get_output_embeddings().weight, frozen, rtol=0, atol=0)


def test_taid_moves_once_a_step(llama, arguments, examples):
    objective = TAIDLoss(alpha="auto")
    steps = []
    plain_update = objective.update
    objective.update = lambda stats, step, total: (
        steps.append((stats["loss"], step, total)),
        plain_update(stats, step, total),
    )
    training = arguments(max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = train(llama(), training, examples, objective, teacher=llama(3, seed=1))
    assert [step for _, *step in steps] == [[1, 4], [2, 4], [3, 4], [4, 4]]
    assert [loss for loss, *_ in steps] == pytest.approx(losses(trainer), rel=1e-6)
    logged = [entry["t"] for entry in trainer.state.log_history if "t" in entry]
    # The first loss is only remembered; from the second on the linear floor leads.
    assert logged == pytest.approx([0.4, 0.4, 0.7, 0.85], rel=1e-3)
    assert objective.t == 1


def test_parameters_of_the_objective_are_trained(llama, arguments, examples):
    class Scaled(torch.nn.Module):
        needs_teacher = False

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, student, teacher, batch):
            logits = student.logits * self.scale
            total = torch.nn.functional.cross_entropy(logits, student.index.target, reduction="sum")
            return {"loss": total / batch["denominator"]}

    objective = Scaled()
    seen = []
    objective.scale.register_hook(lambda gradient: seen.append(gradient.item()))
    trainer = train(llama(), arguments(max_steps=3, weight_decay=0.1), examples, objective)
    assert objective.scale.item() != 1
    assert objective.scale.grad is None  # zeroed after each step, not added up
    group = trainer.optimizer.param_groups[-1]
    assert group["params"][0] is objective.scale
    assert group["weight_decay"] == 0


def test_evaluation_by_hand(llama, arguments, examples):
    teacher, student = llama(3, seed=1), llama()
    trainer = DistillTrainer(
        student,
        arguments(per_device_eval_batch_size=5),
        objective=DivergenceObjective("reverse_kl"),
        teacher=teacher,
        eval_dataset=examples,
    )
    metrics = trainer.evaluate()
    batch = collate(examples.examples)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        p = teacher.double()(**inputs).logits[:, :-1].log_softmax(-1)
        q = student.double()(**inputs).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    chosen = labels.clamp(min=0)[..., None]
    expected = {
        "loss": -q.gather(2, chosen)[..., 0][kept].mean().item(),
        "perplexity": math.exp(-q.gather(2, chosen)[..., 0][kept].mean().item()),
        "reference_perplexity": math.exp(-p.gather(2, chosen)[..., 0][kept].mean().item()),
        "forward_kl": (p.exp() * (p - q)).sum(-1)[kept].mean().item(),
        "reverse_kl": (q.exp() * (q - p)).sum(-1)[kept].mean().item(),
        "acceptance": torch.minimum(p.exp(), q.exp()).sum(-1)[kept].mean().item(),
        "agreement": (p.argmax(-1) == q.argmax(-1))[kept].double().mean().item(),
        "tokens": kept.sum().item(),
    }
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name


def test_a_broken_model_has_no_perplexity():
    sums = torch.ones(2, 7)
    sums[1, 1] = torch.nan
    assert math.isnan(summarize(sums)["perplexity"])
    sums[1, 1] = 1e4
    assert summarize(sums)["perplexity"] == math.inf


def test_a_part_may_be_missing_now_and_then(llama, arguments, examples):
    class Sometimes(DivergenceObjective):
        calls = 0

        def __call__(self, *rows):
            self.calls += 1
            extra = {"extra": torch.tensor(3.0)} if self.calls % 2 else {}
            return super().__call__(*rows) | extra

    objective = Sometimes("cross_entropy")
    trainer = train(llama(), arguments(max_steps=4, logging_steps=2), examples, objective)
    logged = [log["extra"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx([3.0, 3.0])


def test_a_checkpoint_without_its_optimiser_is_not_resumed(llama, arguments, examples):
    training = dict(max_steps=2, save_strategy="steps", save_steps=1, save_only_model=True)
    trainer = train(llama(), arguments(**training), examples, teacher=llama(3))
    with pytest.raises(ValueError, match="checkpoint-2 was saved with save_only_model"):
        trainer.train(resume_from_checkpoint=True)


def test_a_trainer_that_goes_on_counts_its_seconds_once(llama, arguments, examples):
    training = arguments(max_steps=2, save_strategy="steps", save_steps=2)
    trainer = train(llama(), training, examples, teacher=llama(3))
    before = trainer.seconds()["total"], trainer.tokens
    trainer.train(resume_from_checkpoint=True)
    assert trainer.seconds()["total"] < 1.5 * before[0]
    assert trainer.tokens == before[1]


def test_without_targets_a_step_changes_nothing(llama, arguments, examples):
    objective = TAIDLoss()
    for example in examples.examples:
        example.loss_mask[:] = False
    student = llama()
    start = copy.deepcopy(student)
    trainer = train(student, arguments(weight_decay=0.0), examples, objective, teacher=llama(3))
    assert losses(trainer) == [0, 0]
    assert objective.t == pytest.approx(0.4)
    for ours, theirs in zip(student.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nan_stops_and_names_the_batch(llama, arguments, examples):
    class Breaks(DivergenceObjective):
        calls = 0

        def __call__(self, student, teacher, batch):
            parts = super().__call__(student, teacher, batch)
            self.calls += 1
            if self.calls == 4:
                self.records = batch["record"].tolist()
                parts["loss"] = parts["loss"] * torch.nan
            return parts

    objective = Breaks("cross_entropy")
    training = arguments(max_steps=6, save_strategy="steps", save_steps=2)
    with pytest.raises(NonFiniteLoss) as error:
        train(llama(), training, examples, objective)
    message = str(error.value)
    assert "loss is nan in step 4" in message
    assert f"records {objective.records} of the data" in message
    assert "checkpoint-2" in message
    assert "\n" not in message


def test_broken_weights_are_not_saved(llama, arguments, examples):
    class Breaks(DivergenceObjective):
        def update(self, stats, step, total_steps):
            if step == 2:
                with torch.no_grad():
                    self.model.lm_head.weight[0, 0] = torch.inf

    objective, student = Breaks("cross_entropy"), llama()
    objective.model = student
    training = arguments(max_steps=4, save_strategy="steps", save_steps=1)
    with pytest.raises(NonFiniteLoss, match="lm_head.weight has non-finite .*checkpoint-1"):
        train(student, training, examples, objective)


def test_broken_weights_of_another_process_are_an_error_here_too(llama, arguments, monkeypatch):
    trainer = DistillTrainer(llama(), arguments(), objective=DivergenceObjective("cross_entropy"))
    names = [name for name, _ in trainer.model.named_parameters()]
    trainer.require_finite_weights()

    def with_another(flags, reduction):
        assert reduction == "sum"
        return flags + torch.eye(len(flags))[3]

    monkeypatch.setattr(trainer.accelerator, "reduce", with_another)
    with pytest.raises(NonFiniteLoss, match=f"{names[3]} has non-finite values"):
        trainer.require_finite_weights()


def test_a_step_with_fewer_targets_than_processes(llama, arguments, monkeypatch):
    """One token on two processes: each adds half of its gradient, and the mean is the whole."""
    seen = []

    def objective(student, teacher, batch):
        seen.append(float(batch["denominator"]))
        return {"loss": student.logits.sum()}

    objective.needs_teacher = False
    trainer = DistillTrainer(llama(), arguments(), objective=objective)
    monkeypatch.setattr(trainer.accelerator.state, "num_processes", 2, raising=False)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    ids = torch.arange(8).view(1, 8)
    labels = torch.full_like(ids, -100).index_fill(1, torch.tensor([3]), 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    for count in (1, 0, 6):
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(count))
    assert seen == [0.5, 0.5, 3.0]


def test_seconds_and_rates(llama, arguments, examples):
    class Slow(DivergenceObjective):
        def __call__(self, *rows):
            time.sleep(0.1)
            return super().__call__(*rows)

    teacher, student = llama(3), llama()
    teacher.register_forward_hook(lambda *_: time.sleep(0.2))
    student.register_forward_hook(lambda *_: time.sleep(0.3))
    objective = Slow("forward_kl")
    trainer = train(student, arguments(max_steps=3), examples, objective, teacher=teacher)
    seconds = trainer.seconds()
    slept = {"loss": 0.3, "teacher": 0.6, "student": 0.9, "total": 1.8}
    # A step of these models takes milliseconds; a loaded machine may take tenths.
    for part, least in slept.items():
        assert least <= seconds[part] < least + 0.8, part
    assert seconds["rest"] >= 0
    rates = [log["tokens_per_second"] for log in trainer.state.log_history if "loss" in log]
    assert len(rates) == 3
    assert min(rates) > 0


def test_padded_columns_are_left_out(llama, arguments, examples):
    """A teacher whose head is padded with rows that would win every softmax."""
    teacher = llama(3, vocab_size=272, seed=1)
    with torch.no_grad():
        teacher.lm_head.weight[259:] = 9
    options = dict(teacher=teacher, vocab_size=259, eval_dataset=examples)
    trainer = train(llama(), arguments(), examples, **options)
    narrow = llama(3, vocab_size=272, seed=1)
    narrow.lm_head.weight = torch.nn.Parameter(narrow.lm_head.weight[:259].detach())
    expected = train(llama(), arguments(), examples, teacher=narrow, eval_dataset=examples)
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-5)
    ours, theirs = trainer.evaluate(), expected.evaluate()
    for name in ("eval_loss", "eval_forward_kl", "eval_reference_perplexity"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_what_cannot_be_trained(llama, arguments):
    with pytest.raises(ValueError, match="DivergenceObjective compares with a teacher"):
        DistillTrainer(llama(), arguments(), objective=DivergenceObjective("jsd"))
    with pytest.raises(ValueError, match=r"label_weight is a share in \[0, 1\], got 2"):
        DivergenceObjective("jsd", label_weight=2)
    trainer = DistillTrainer(
        llama(),
        arguments(),
        objective=DivergenceObjective("cross_entropy"),
        train_dataset=ExampleSet([]),
        data_collator=lambda rows: {"input_ids": torch.zeros(1, 4, dtype=torch.int64)},
    )
    with pytest.raises(ValueError, match="a batch needs labels, this one has input_ids"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})
