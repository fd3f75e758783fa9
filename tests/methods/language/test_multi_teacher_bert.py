"""Several teachers: the loss of their mixture by identities, its gradient, and as an objective."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from stillhouse import ops
from stillhouse.methods.language import (
    EnsembleLoss,
    TeacherEnsemble,
    common_tokens,
    ensemble_kl,
    multi_teacher_loss,
)
from stillhouse.nn.surgery import take_layers
from stillhouse.train import LogitRows, supervised_rows

DOUBLE = torch.float64


def logits(*shape, count=3):
    return (2 * torch.randn(count, *shape, dtype=DOUBLE)).unbind(0)


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("weights", [None, (0.2, 0.3, 0.5), (2.0, 3.0, 5.0), "entropy"])
def test_it_is_the_mixture_and_the_teachers_disagreement(weights):
    """sum w KL(p_k || q) = KL(p || q) + JSD_w, and its gradient tau (q - p)."""
    z, *teachers = logits(4, 6, 11, count=4)
    p = torch.stack([(t / 2).softmax(-1) for t in teachers])
    if weights == "entropy":
        w = torch.exp((p * p.log()).sum(-1))
        w = (w / w.sum(0))[..., None]
    else:
        w = torch.tensor([1.0] * 3 if weights is None else weights, dtype=DOUBLE)
        w = (w / w.sum())[:, None, None, None]
    mixture, q = (w * p).sum(0), (z / 2).softmax(-1)
    disagreement = (w[..., 0] * kl(p, mixture)).sum(0)
    given = z.clone().requires_grad_()
    loss = ensemble_kl(given, teachers, weights=weights)
    loss.backward()
    want = 4 * (kl(mixture, q) + disagreement).mean()
    torch.testing.assert_close(loss.detach(), want, rtol=1e-9, atol=0)
    torch.testing.assert_close(given.grad, 2 * (q - mixture) / 24, rtol=1e-6, atol=1e-9)


def test_one_teacher_is_plain_distillation():
    z, teacher = logits(5, 7, count=2)
    want = 9 * kl((teacher / 3).softmax(-1), (z / 3).softmax(-1)).mean()
    for options in ({}, {"weights": "entropy"}, {"combine": "logits"}, {"weights": [4.0]}):
        found = ensemble_kl(z, [teacher], temperature=3.0, **options)
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("combine", ["probs", "logits"])
def test_a_weight_of_one_is_that_teacher(combine):
    z, *teachers = logits(5, 7)
    for k in range(2):
        weights = torch.eye(2)[k]
        found = ensemble_kl(z, teachers, weights=weights, combine=combine)
        torch.testing.assert_close(found, ensemble_kl(z, [teachers[k]]))


def test_the_mean_of_logits_is_another_teacher():
    z, *teachers = logits(5, 7)
    mean = (teachers[0] + 3 * teachers[1]) / 4
    want = 4 * kl((mean / 2).softmax(-1), (z / 2).softmax(-1)).mean()
    found = ensemble_kl(z, teachers, weights=(1, 3), combine="logits")
    torch.testing.assert_close(found, want)
    certain = torch.softmax(-torch.stack([entropy(t / 2) for t in teachers]), 0)[..., None]
    mean = (certain * torch.stack(teachers)).sum(0)
    want = 4 * kl((mean / 2).softmax(-1), (z / 2).softmax(-1)).mean()
    found = ensemble_kl(z, teachers, weights="entropy", combine="logits")
    torch.testing.assert_close(found, want)


def entropy(x):
    log_p = x.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def test_only_unmasked_rows_count():
    z, *teachers = logits(2, 5, 7)
    mask = torch.tensor([[True, True, False, False, False], [True, False, True, False, True]])
    given = z.clone().requires_grad_()
    for options in ({}, {"weights": "entropy"}, {"combine": "logits"}):
        loss = ensemble_kl(given, teachers, mask=mask, **options)
        kept = ensemble_kl(z[mask], [t[mask] for t in teachers], **options)
        torch.testing.assert_close(loss.detach(), kept)
        (gradient,) = torch.autograd.grad(loss, given)
        assert gradient[~mask].abs().max() == 0
        assert gradient[mask].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_models_compute_in(dtype):
    z, *teachers = logits(5, 7)
    narrow = [x.to(dtype) for x in (z, *teachers)]
    wide = [x.double() for x in narrow]
    for options in ({}, {"weights": "entropy"}):
        found = ensemble_kl(narrow[0], narrow[1:], **options)
        assert found.dtype == torch.float32
        want = ensemble_kl(wide[0], wide[1:], **options)
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_logits": []}, "no teacher"),
        ({"weights": (-1.0, 2.0)}, "expected 2 weights from 0 on"),
        ({"weights": (0.0, 0.0)}, "expected 2 weights from 0 on"),
        ({"weights": (1.0, 1.0, 1.0)}, "expected 2 weights"),
        ({"weights": "even"}, "weights must be numbers, None or 'entropy', got 'even'"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"combine": "mean"}, "combine must be 'probs' or 'logits', got 'mean'"),
        (
            {"teacher_logits": [torch.zeros(3, 5), torch.zeros(3, 6)]},
            "teacher 1 has 6 columns and the student 5: .*retokenize_embeddings.*common_tokens",
        ),
        ({"teacher_logits": [torch.zeros(3, 5, requires_grad=True)]}, "no gradient flows"),
    ],
)
def test_bad_input(changes, message):
    given = {"student_logits": torch.zeros(3, 5), "teacher_logits": [torch.zeros(3, 5)] * 2}
    with pytest.raises(ValueError, match=message):
        ensemble_kl(**(given | changes))


def test_a_teacher_of_another_vocabulary_is_compared_where_both_have_words():
    """Common tokens and one bucket, on both sides: a distribution of four outcomes."""
    z, own = logits(6, 9, count=2)
    (other,) = logits(6, 5, count=1)
    of_student, of_teacher = torch.tensor([8, 0, 3]), torch.tensor([1, 4, 0])
    p, q = (other / 2).softmax(-1)[:, of_teacher], (z / 2).softmax(-1)[:, of_student]
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    sparse = common_tokens(other.float(), of_student, of_teacher, 9)
    found = ensemble_kl(z, [sparse])
    torch.testing.assert_close(found, 4 * kl(p, q).mean(), rtol=1e-4, atol=1e-6)
    both = ensemble_kl(z, [own, sparse], weights=(1, 3))
    torch.testing.assert_close(both, (ensemble_kl(z, [own]) + 3 * found) / 4)
    with pytest.raises(ValueError, match="teacher 1 has no logits to average"):
        ensemble_kl(z, [own, sparse], combine="logits")
    with pytest.raises(ValueError, match=r"got \(3,\) of the student and \(2,\) of the teacher"):
        common_tokens(other, of_student, of_teacher[:2], 9)


# Masked text --------------------------------------------------------------------------------------


def test_the_three_losses_and_their_sum():
    z, *teachers = logits(2, 4, 9)
    hidden, *states = logits(2, 4, 6)
    labels = torch.full((2, 4), -100)
    labels[0, 1], labels[1, 2] = 5, 0
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    pairs = list(zip(teachers, states, strict=True))
    parts = multi_teacher_loss((z, hidden), pairs, labels, mask, temperature=3.0)
    torch.testing.assert_close(
        parts["ce"], ensemble_kl(z[mask], [t[mask] for t in teachers], temperature=3.0)
    )
    torch.testing.assert_close(parts["mlm"], cross_entropy(z[[0, 1], [1, 2]], torch.tensor([5, 0])))
    cosine = [(hidden * s).sum(-1) / (hidden.norm(dim=-1) * s.norm(dim=-1)) for s in states]
    torch.testing.assert_close(parts["cos"], (1 - torch.stack(cosine))[:, mask].mean())
    want = 5 * parts["ce"] + 2 * parts["mlm"] + parts["cos"]
    torch.testing.assert_close(parts["loss"], want)
    other = multi_teacher_loss((z, hidden), pairs, labels, mask, ce=0.5, mlm=0.0, cos=2.0)
    want = 0.5 * ensemble_kl(z, teachers, mask=mask) + 2 * other["cos"]
    torch.testing.assert_close(other["loss"], want)


def test_hidden_states_of_another_width():
    z, teacher = logits(1, 4, 9, count=2)
    with pytest.raises(ValueError, match=r"teacher 0 are \(1, 4, 8\), the student's \(1, 4, 6\)"):
        multi_teacher_loss(
            (z, torch.ones(1, 4, 6)),
            [(teacher, torch.ones(1, 4, 8))],
            torch.full((1, 4), -100),
            torch.ones(1, 4, dtype=torch.bool),
        )


def bert(layers=4):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return BertForMaskedLM(config).eval()


def test_a_student_of_all_layers_is_its_teacher():
    """And of some of them what these layers make: the student of the paper has every second."""
    teacher, ids = bert(), torch.randint(0, 40, (2, 7))
    with torch.no_grad():
        assert torch.equal(take_layers(teacher, range(4))(ids).logits, teacher(ids).logits)
        half = take_layers(teacher, [0, 2])
        state = teacher.bert.embeddings(ids)
        for layer in (0, 2):
            state = teacher.bert.encoder.layer[layer](state)
            state = state[0] if isinstance(state, tuple) else state
        torch.testing.assert_close(half(ids).logits, teacher.cls(state))
    with pytest.raises(ValueError, match="layer 4 does not exist"):
        take_layers(teacher, [0, 4])


# The objective ------------------------------------------------------------------------------------


def rows(x, index):
    return LogitRows(x, index)


@pytest.mark.parametrize("weights", [None, (1, 3), "entropy"])
def test_the_objective_is_the_function(weights):
    index = supervised_rows(torch.randint(0, 9, (2, 6)))
    z, *teachers = logits(10, 9)
    given = z.clone().requires_grad_()
    objective = EnsembleLoss(weights, temperature=3.0, label_weight=0.25)
    batch = {"vocab_size": 7, "denominator": torch.tensor(20)}
    labels = index.target.clamp(max=6)
    index = index._replace(target=labels)
    parts = objective(rows(given * 1, index), [rows(t, index) for t in teachers], batch)
    cut = [t[:, :7] for t in teachers]
    soft = ensemble_kl(z[:, :7], cut, weights=weights, temperature=3.0)
    want = (0.75 * soft + 0.25 * cross_entropy(z[:, :7], labels)) * 10 / 20
    torch.testing.assert_close(parts["loss"].detach(), want)
    for k, teacher in enumerate(cut):
        one = kl((teacher / 3).softmax(-1), (z[:, :7] / 3).softmax(-1)).mean()
        torch.testing.assert_close(parts[f"kl_{k}"], one)
    parts["loss"].backward()
    assert given.grad[:, 7:].abs().max() == 0


def test_what_the_objective_refuses():
    index = supervised_rows(torch.zeros(1, 4, dtype=torch.int64))
    one = rows(torch.zeros(3, 9), index)
    for teacher in (None, one, []):
        with pytest.raises(ValueError, match="pass a TeacherEnsemble"):
            EnsembleLoss()(one, teacher, {})
    with pytest.raises(ValueError, match=r"label_weight is a share in \[0, 1\], got 2"):
        EnsembleLoss(label_weight=2)


def test_it_trains_a_language_model(tmp_path, llama, make_tokenizer):
    """`DistillTrainer` with two teachers: the student comes nearer to both of them."""
    from transformers import TrainingArguments

    from stillhouse.train import DistillTrainer
    from stillhouse.train.examples import encode

    tokenizer = make_tokenizer()
    texts = [{"text": f"{number} words of a text " * 20} for number in range(6)]
    examples = encode(texts, range(6), tokenizer, 32)
    teachers = [llama(2, seed=seed) for seed in (1, 2)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = DistillTrainer(
        llama(1, seed=3),
        arguments,
        objective=EnsembleLoss(),
        teacher=TeacherEnsemble(teachers),
        train_dataset=examples,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "kl_0" in log]
    assert logs[-1]["loss"] < logs[0]["loss"]
    for name in ("kl_0", "kl_1"):
        assert logs[-1][name] < logs[0][name]
    assert not any(parameter.requires_grad for t in teachers for parameter in t.parameters())


def test_its_kernels_are_those_of_forward_kl(monkeypatch):
    """K passes over logits, and no mixture of probabilities."""
    calls, op = [], ops.divergence

    def counted(student, teacher, *kinds, **options):
        calls.append((teacher, kinds))
        return op(student, teacher, *kinds, **options)

    monkeypatch.setattr(ops, "divergence", counted)
    z, *teachers = logits(5, 7)
    ensemble_kl(z, teachers)
    assert [id(teacher) for teacher, _ in calls] == [id(teacher) for teacher in teachers]
    assert all(not kinds for _, kinds in calls)
