import copy
from contextlib import nullcontext

import pytest
import torch

from stillhouse.train import (
    AdaptiveShare,
    DistillTrainer,
    DivergenceObjective,
    OnPolicy,
    Replay,
    rollout,
)
from stillhouse.train.examples import collate


def counts(ids):
    """A model that always says the next number."""
    return 50 * torch.nn.functional.one_hot((ids + 1) % 100, 100).float()


def made(*rows):
    """A batch of (ids, targets as 0 and 1)."""
    width = max(len(ids) for ids, _ in rows)
    ids, labels, mask = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
    labels += -100
    for row, (tokens, targets) in enumerate(rows):
        n = len(tokens)
        ids[row, :n], mask[row, :n] = torch.tensor(tokens), 1
        labels[row, :n] = torch.where(torch.tensor(targets, dtype=torch.bool), ids[row, :n], -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_what_a_prompt_is():
    """What comes before the last answer; of text, which is all targets, its first tokens."""
    batch = made(
        ([1, 2, 3, 60, 4, 5, 70, 71], [0, 0, 0, 1, 0, 0, 1, 1]),
        ([10, 80, 81, 82, 83], [0, 1, 1, 1, 1]),
        ([20, 90], [0, 1]),
        ([30, 31], [0, 0]),
    )
    respond = OnPolicy(max_new_tokens=2, prompt_tokens=3, eos_token_id=(), temperature=0)
    new, share = respond(counts, batch, 0)
    assert new["input_ids"].tolist() == [
        [1, 2, 3, 60, 4, 5, 6, 7],
        [10, 80, 81, 82, 83, 0, 0, 0],
        [20, 90, 0, 0, 0, 0, 0, 0],
        [30, 31, 0, 0, 0, 0, 0, 0],
    ]
    assert new["attention_mask"].sum(1).tolist() == [8, 5, 2, 2]
    none = [-100] * 3
    assert new["labels"][:, 3:].tolist() == [
        [*none, 6, 7],
        [82, 83, *none],
        [-100, *none, -100],
        [-100, *none, -100],
    ]
    assert new["labels"][:, :3].tolist() == [none, none, [-100, 90, -100], none]
    assert share == 4 / 5  # what is too short for a prompt keeps its own target


def test_the_students_own_words(llama):
    """Greedy responses are those of transformers' generate, one prompt at a time."""
    model = llama(2, seed=5)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (9, 6, 12)]
    batch = made(*[(ids, [0] * 4 + [1] * (len(ids) - 4)) for ids in rows])
    respond = OnPolicy(max_new_tokens=5, temperature=0, eos_token_id=())
    new, share = respond(model, batch, 0)
    assert share == 1
    for row, ids in enumerate(rows):
        alone = model.generate(
            torch.tensor([ids[:4]]), max_new_tokens=5, do_sample=False, eos_token_id=None
        )
        assert new["input_ids"][row].tolist() == alone[0].tolist()


@pytest.mark.parametrize(("per", "tolerance"), [("batch", 0.12), ("row", 0.06)])
def test_the_share(per, tolerance):
    batch = made(*[([1, 2, 50], [0, 0, 1])] * 4)
    respond = OnPolicy(0.3, max_new_tokens=1, per=per, eos_token_id=())
    written = [respond(counts, batch, number)[1] for number in range(200)]
    assert set(written) <= ({0, 1} if per == "batch" else {0, 0.25, 0.5, 0.75, 1})
    assert sum(written) / 200 == pytest.approx(0.3, abs=tolerance)
    other = [respond(counts, batch, number, process=1)[1] for number in range(200)]
    assert other != written
    assert written == [respond(counts, batch, number)[1] for number in range(200)]


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
        OnPolicy(1.5, max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens and prompt_tokens must be at least 1"):
        OnPolicy(max_new_tokens=0)
    batch = made(([1, 2, 50], [0, 0, 1])) | {"teacher_ids": torch.zeros(1, 1)}
    with pytest.raises(ValueError, match="cannot respond in a batch with teacher_ids"):
        OnPolicy(max_new_tokens=1)(counts, batch, 0)
    with pytest.raises(ValueError, match="needs a source with replay"):
        AdaptiveShare(OnPolicy(max_new_tokens=1))
    with pytest.raises(ValueError, match="increment in"):
        AdaptiveShare(OnPolicy(max_new_tokens=1, replay=Replay()), increment=0)


def trainer_of(student, training, examples, teacher, objective="forward_kl", **options):
    if isinstance(objective, str):
        objective = DivergenceObjective(objective)
    return DistillTrainer(
        student, training, objective=objective, teacher=teacher, train_dataset=examples, **options
    )


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_the_first_loss_by_hand(llama, arguments, examples):
    """Forward KL in float64 torch over what the student says, a mean over its tokens."""
    teacher, student = llama(3, seed=1), llama()
    batch = collate(examples.examples)
    prompts = [row[:3] for row in batch["input_ids"]]
    said = rollout(student, prompts, max_new_tokens=4, temperature=0, seed=0)
    new = said.batch()
    inputs = {name: new[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        p = copy.deepcopy(teacher).double()(**inputs).logits[:, :-1].log_softmax(-1)
        q = copy.deepcopy(student).double()(**inputs).logits[:, :-1].log_softmax(-1)
    kept = new["labels"][:, 1:] != -100
    expected = (p.exp() * (p - q)).sum(-1)[kept].mean().item()
    for each in examples.examples:
        each.loss_mask[:] = True  # plain text: the prompt is its first tokens
    respond = OnPolicy(max_new_tokens=4, prompt_tokens=3, temperature=0)
    training = arguments(max_steps=1, per_device_train_batch_size=6, gradient_accumulation_steps=4)
    trainer = trainer_of(student, training, examples, teacher, on_policy=respond)
    student.eval()
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert logged(trainer, "on_policy") == [1.0]
    assert trainer.tokens == kept.sum()
    assert trainer.seconds()["responses"] > 0
    assert student.training


def test_resumed_with_what_was_replayed(llama, arguments, examples, tmp_path):
    teacher = llama(3, seed=1)
    options = dict(max_new_tokens=4, prompt_tokens=3)

    class Stop(Exception):
        pass

    def run(folder, steps, **more):
        training = arguments(
            max_steps=6, save_steps=3, save_strategy="steps", output_dir=str(tmp_path / folder)
        )
        respond = OnPolicy(0.8, replay=Replay(8), seed=3, **options)
        trainer = trainer_of(llama(), training, examples, teacher, on_policy=respond)
        finish = trainer.finish_step

        def finish_or_stop(seconds):
            finish(seconds)
            if trainer.state.global_step == steps < 6:
                raise Stop

        trainer.finish_step = finish_or_stop
        with pytest.raises(Stop) if steps < 6 else nullcontext():
            trainer.train(**more)
        return trainer

    whole = run("whole", 6)
    assert 0 < sum(logged(whole, "on_policy")) < 6
    assert whole.on_policy.replay.held
    run("cut", 4)
    again = run("cut", 6, resume_from_checkpoint=True)
    assert logged(again) == logged(whole)
    assert [a.tolist() for a, _ in again.on_policy.replay.held] == [
        a.tolist() for a, _ in whole.on_policy.replay.held
    ]


def test_an_objective_that_revises(llama, arguments, examples):
    seen = []

    class Revising(DivergenceObjective):
        def revise(self, student, teacher, responses, *, seed, **sampling):
            seen.append((student, teacher, len(responses), sampling["temperature"]))
            return responses

    teacher, student = llama(3, seed=1), llama()
    respond = OnPolicy(max_new_tokens=2, prompt_tokens=3, temperature=0.7)
    training = arguments(max_steps=1)
    trainer_of(student, training, examples, teacher, Revising(), on_policy=respond).train()
    assert seen == [(student, teacher, 4, 0.7)]


def test_an_adaptive_share_follows_the_evaluation(llama, arguments, examples):
    source = OnPolicy(max_new_tokens=2, prompt_tokens=3, replay=Replay())
    schedule = AdaptiveShare(source, tolerance=0.0)
    assert source.share == 0
    trainer = trainer_of(
        llama(),
        arguments(max_steps=4, eval_strategy="steps", eval_steps=1, learning_rate=0.0),
        examples,
        llama(3, seed=1),
        eval_dataset=examples,
        on_policy=source,
        adaptive_share=schedule,
    )
    trainer.train()
    # The model stands still: each evaluation but the first is as bad as the last, and counts.
    assert source.share == pytest.approx(0.3)
    assert source.replay.share == 1


def test_a_stored_teacher_knows_no_new_responses(llama, arguments, examples):
    with pytest.raises(ValueError, match="a stored teacher knows nothing of new responses"):
        trainer_of(
            llama(),
            arguments(),
            examples,
            lambda batch, index: None,
            on_policy=OnPolicy(max_new_tokens=2),
        )
