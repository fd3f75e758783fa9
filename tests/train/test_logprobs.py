"""Log-probabilities of sequences against whole logits."""

import pytest
import torch

from stillhouse import ops
from stillhouse.train import sequence_logprobs


def expected(model, batch, columns=None):
    """float64 [B, T] at the targets, 0 elsewhere."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    log_q = model(**inputs).logits[:, :-1, :columns].double().log_softmax(-1)
    labels = batch["labels"][:, 1:]
    chosen = log_q.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    return torch.nn.functional.pad(chosen, (1, 0))


def test_each_reduction_against_whole_logits(llama, batch):
    model, size = llama(), torch.tensor([31, 17])
    want = expected(model, batch)
    count = (batch["labels"][:, 1:] != -100).sum(1)
    for reduction, value in (
        ("sum", want.sum(1)),
        ("mean", want.sum(1) / count),
        ("none", want),
        ("per_byte", want.sum(1) / size),
    ):
        found = sequence_logprobs(model, {**batch, "bytes": size}, reduction=reduction)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        sequence_logprobs(model, batch), want.sum(1).float(), rtol=1e-5, atol=1e-4
    )


def test_gradient_is_that_of_whole_logits(llama, batch):
    model, weight = llama().double(), torch.tensor([1.0, -0.3]).double()
    parameters = list(model.parameters())
    found = torch.autograd.grad((sequence_logprobs(model, batch) * weight).sum(), parameters)
    want = torch.autograd.grad((expected(model, batch).sum(1) * weight).sum(), parameters)
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_no_logits_exist(llama, batch, monkeypatch):
    model, widest = llama(), []
    head = model.lm_head
    monkeypatch.setattr(
        torch.nn.Linear, "forward", _recording(torch.nn.Linear.forward, head, widest)
    )
    called = []
    monkeypatch.setattr(ops, "linear_divergence", _counting(ops.linear_divergence, called))
    sequence_logprobs(model, batch)
    assert called == [1]
    assert widest == []


def _recording(forward, head, widest):
    def recorded(self, x):
        if self is head:
            widest.append(x.shape)
        return forward(self, x)

    return recorded


def _counting(function, called):
    def counted(*args, **options):
        called.append(1)
        return function(*args, **options)

    return counted


def test_padded_columns_are_left_out(llama, batch):
    model = llama()
    want = expected(model, batch, columns=257).sum(1)
    assert (want > expected(model, batch).sum(1)).all()
    found = sequence_logprobs(model, {**batch, "vocab_size": 257})
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-4)


def test_a_sequence_without_a_target_has_zero(llama, batch):
    labels = batch["labels"].clone()
    labels[1] = -100
    changed = {**batch, "labels": labels}
    for reduction in ("sum", "mean"):
        found = sequence_logprobs(llama(), changed, reduction=reduction)
        assert found[1] == 0
        assert found[0] < 0


@pytest.mark.parametrize(
    ("reduction", "changes", "message"),
    [
        ("max", dict(), "reduction must be sum, mean, none or per_byte, got 'max'"),
        ("per_byte", dict(), "per_byte needs"),
        ("per_byte", dict(bytes=torch.tensor([3, 0])), "per_byte needs"),
        ("sum", dict(labels=None), "a batch needs labels"),
    ],
)
def test_bad_input(llama, batch, reduction, changes, message):
    changed = {name: each for name, each in {**batch, **changes}.items() if each is not None}
    with pytest.raises(ValueError, match=message):
        sequence_logprobs(llama(), changed, reduction=reduction)


def test_a_model_without_a_head_is_refused(batch):
    with pytest.raises(ValueError, match="has no output head"):
        sequence_logprobs(torch.nn.Linear(2, 2), batch)
