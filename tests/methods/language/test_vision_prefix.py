"""Features in front of a language model's tokens, against embeddings put together by hand."""

import pytest
import torch
from torch import nn

from stillhouse.methods.language import LLaVAMoDLoss, VisionPrefix
from stillhouse.train import Stage, Taught, run_stages, sequence_logprobs, supervised_rows

TOKEN = 257


def projector(seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 32))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return layers


def batch():
    ids = torch.arange(20).view(2, 10)
    labels = ids.clone()
    labels[:, :6] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def features(count, seed=0):
    return torch.randn(2, count, 6, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_model_on_embeddings_by_hand(llama):
    model = llama(2)
    prefix, shown = VisionPrefix(model, projector(), TOKEN), features(3)
    longer = prefix.expand(batch(), shown)
    found = prefix(longer["input_ids"], features=shown, attention_mask=longer["attention_mask"])
    embedded = torch.cat(
        [prefix.projector(shown), model.get_input_embeddings()(batch()["input_ids"])], 1
    )
    torch.testing.assert_close(found.logits, model(inputs_embeds=embedded).logits)
    assert longer["labels"][:, :9].unique().tolist() == [-100]
    torch.testing.assert_close(longer["labels"][:, 3:], batch()["labels"])


def test_features_may_stand_among_the_tokens(llama):
    model = llama(1)
    prefix, shown = VisionPrefix(model, projector(), TOKEN), features(2)
    ids = torch.tensor([[4, TOKEN, TOKEN, 5], [TOKEN, 6, 7, TOKEN]])
    projected = prefix.projector(shown)
    embedded = model.get_input_embeddings()(ids).clone()
    embedded[0, 1:3], embedded[1, [0, 3]] = projected[0], projected[1]
    found = prefix(ids, features=shown).logits
    torch.testing.assert_close(found, model(inputs_embeds=embedded).logits)


def test_without_features_it_is_the_model(llama):
    model = llama(1)
    prefix = VisionPrefix(model, projector(), TOKEN)
    ids = batch()["input_ids"]
    torch.testing.assert_close(prefix(ids).logits, model(ids).logits)
    assert prefix.get_output_embeddings() is model.lm_head


def test_rows_are_those_of_the_response(llama):
    """With another number of features before the same text, rows are matched by their targets."""
    teacher = VisionPrefix(llama(2, seed=1), projector(1), TOKEN)
    student = VisionPrefix(llama(1, seed=2), projector(2), TOKEN)
    long, short = student.expand(batch(), features(5)), student.expand(batch(), features(3))
    assert supervised_rows(long["labels"]).target.tolist() == [6, 7, 8, 9, 16, 17, 18, 19]
    logits = [
        model(each["input_ids"], features=each["features"]).logits
        for model, each in ((student, short), (teacher, long))
    ]
    q, p = logits[0][:, 8:12].log_softmax(-1), logits[1][:, 10:14].log_softmax(-1)

    class Longer(nn.Module):
        def forward(self, ids):
            seen = teacher(long["input_ids"], features=long["features"]).logits
            return seen[:, 2:]  # what the student's batch has of it

    loss = Taught(LLaVAMoDLoss(), Longer())(student, short)
    torch.testing.assert_close(loss["loss"], -(p.exp() * q).sum(-1).mean())
    total = sequence_logprobs(student, short)
    want = q.gather(-1, batch()["labels"][:, 6:, None]).sum((1, 2))
    torch.testing.assert_close(total, want)


def test_the_first_stage_trains_the_projector_alone(llama):
    student = VisionPrefix(llama(1), projector(), TOKEN)
    before = {name: each.detach().clone() for name, each in student.named_parameters()}
    data = [student.expand(batch(), features(3))]
    from stillhouse.train import DivergenceObjective

    taught = Taught(DivergenceObjective("cross_entropy"))
    stage = Stage("adaptor", taught, 5, parameters="projector.*", data=data, lr=1e-2)
    history = run_stages(student, [stage])
    moved = {n for n, each in student.named_parameters() if not torch.equal(each, before[n])}
    assert moved == {n for n in before if n.startswith("projector.")}
    assert history[-1]["loss"] < history[0]["loss"]


def test_bad_input(llama):
    prefix = VisionPrefix(llama(1), projector(), TOKEN)
    longer = prefix.expand(batch(), features(3))
    with pytest.raises(ValueError, match=rf"expected 4 tokens {TOKEN} a sequence.*got \[3, 3\]"):
        prefix(longer["input_ids"], features=features(4))
    with pytest.raises(ValueError, match="2 sequences and features of 1 images"):
        prefix.expand(batch(), features(3)[:1])
    with pytest.raises(ValueError, match=f"the text has the token {TOKEN}"):
        prefix.expand(longer, features(3))
