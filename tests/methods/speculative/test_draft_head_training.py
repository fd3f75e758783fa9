"""Training of draft heads: what they read, what counts, and runs that go on."""

import pytest
import torch

from stillhouse.methods.speculative import (
    FSPADHead,
    draft_head_loss,
    draft_head_training,
    target_features,
    train_draft_head,
)
from stillhouse.teachers import TensorCache

SIZES = dict(hidden=16, ffn=24, heads=4, kv_heads=2)


def batch_of(step, rows=4, length=12):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(11, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_features_are_what_the_output_head_reads(target):
    batch = batch_of(0)
    features = target_features(target, batch)
    torch.testing.assert_close(target.lm_head(features), target(**batch).logits)
    last = target(**batch, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(features, last)


def test_training_lowers_the_loss(target):
    head = FSPADHead(**SIZES, generator=torch.Generator().manual_seed(0))
    history = train_draft_head(target, head, batch_of, steps=60, lr=1e-2)
    assert [row["step"] for row in history] == list(range(1, 61))
    first, last = (
        {name: sum(row[name] for row in part) for name in ("feature", "logits", "acceptance")}
        for part in (history[:10], history[-10:])
    )
    assert last["feature"] < first["feature"]
    assert last["logits"] < first["logits"]
    assert last["acceptance"] > first["acceptance"]


@pytest.mark.parametrize("as_list", [False, True])
def test_a_run_goes_on_where_it_was_interrupted(target, tmp_path, as_list):
    class Stop(Exception):
        pass

    def trained(batches, **options):
        head = FSPADHead(**SIZES, generator=torch.Generator().manual_seed(0))
        history = train_draft_head(target, head, batches, steps=8, lr=1e-2, warmup=2, **options)
        return head, history

    batches = [batch_of(step) for step in range(3)] if as_list else batch_of
    whole, expected = trained(batches)

    calls = []

    def breaks(step):
        calls.append(step)
        if step == 5:
            raise Stop
        return batches[step % 3] if as_list else batch_of(step)

    resume = {"resume": tmp_path / "run.pt", "save_every": 2}
    with pytest.raises(Stop):
        trained(breaks, **resume)
    again, history = trained(batches, **resume)
    assert calls == [0, 1, 2, 3, 4, 5]
    assert history == expected
    for mine, other in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_noise_is_each_steps_own(target):
    def history(**options):
        head = FSPADHead(**SIZES, generator=torch.Generator().manual_seed(0))
        return train_draft_head(target, head, [batch_of(0)], steps=2, lr=0.0, **options)

    noisy, quiet = history(), history(noise=0.0)
    assert quiet[0]["loss"] == quiet[1]["loss"]
    assert noisy[0]["loss"] != noisy[1]["loss"]
    assert noisy == history()
    assert noisy != history(seed=1)


def test_the_noise_is_uniform_and_shorter_for_longer_texts(target):
    seen = {}

    class Spy(FSPADHead):
        def forward(self, features, embeddings, **options):
            seen["features"] = features
            return super().forward(features, embeddings, **options)

    batch = batch_of(0, rows=64)
    train_draft_head(target, Spy(**SIZES), [batch], steps=1, noise=0.2)
    shift = seen["features"] - target_features(target, batch)[:, :-1].float()
    most = 0.1 * 512 / 12
    assert 0.99 * most < shift.max() < most
    assert -most < shift.min() < -0.99 * most
    assert shift.std().item() == pytest.approx(most / 3**0.5, rel=0.02)


def test_what_is_read_and_what_counts(target):
    """Feature t with token t + 1 predicts feature t + 1, where that token is a target."""
    batch = batch_of(0)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :6] = -100
    loss = draft_head_training._HeadLoss(
        target, noise=0.0, seed=0, cache=None, w_feature=1, w_logits=1
    )
    head = FSPADHead(**SIZES, generator=torch.Generator().manual_seed(0)).double()
    parts = loss(head, batch)
    features = target_features(target, batch)
    embeddings = target.get_input_embeddings()(batch["input_ids"])
    outputs = head(features[:, :11], embeddings[:, 1:])
    expected = draft_head_loss(
        *(x[:, 5:] for x in outputs), features[:, 6:], target.lm_head, w_logits=1
    )
    torch.testing.assert_close(parts["loss"], expected["loss"])
    del batch["labels"]
    batch["attention_mask"][:, 8:] = 0
    parts = loss(head, batch)
    features = target_features(target, batch)
    outputs = head(features[:, :7], embeddings[:, 1:8])
    expected = draft_head_loss(*outputs, features[:, 1:8], target.lm_head, w_logits=1)
    torch.testing.assert_close(parts["loss"], expected["loss"])


def test_kept_features_are_made_once(target, tmp_path, monkeypatch):
    made = []

    def counting(*arguments):
        made.append(1)
        return target_features(*arguments)

    monkeypatch.setattr(draft_head_training, "target_features", counting)

    def history(**options):
        head = FSPADHead(**SIZES, generator=torch.Generator().manual_seed(0))
        batches = [batch_of(0), batch_of(1)]
        return train_draft_head(target, head, batches, steps=6, lr=1e-2, **options)

    cache = TensorCache(tmp_path)
    expected = history()
    assert len(made) == 6
    assert history(cache=cache) == expected
    assert history(cache=cache) == expected
    assert len(made) == 8
    # Features that come with the batch are taken as they are.
    batch = batch_of(0)
    given = batch | {"features": target_features(target, batch)}
    heads = [FSPADHead(**SIZES, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    runs = [
        train_draft_head(target, head, [each], steps=3)
        for head, each in zip(heads, (batch, given), strict=True)
    ]
    assert runs[0] == runs[1]
    assert len(made) == 11


def test_training_that_is_refused(target):
    with pytest.raises(ValueError, match="features are 16 wide, the head is for 8"):
        train_draft_head(target, FSPADHead(8, 16, heads=2), batch_of, steps=1)
    short = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
    with pytest.raises(ValueError, match="at least two tokens"):
        train_draft_head(target, FSPADHead(**SIZES), [short], steps=1)


def test_the_rate_rises_and_falls(target):
    optimizer = draft_head_training._ClippedAdamW(
        [torch.nn.Parameter(torch.zeros(1))], 1.0, (0.9, 0.95), clip=0.5, warmup=3, steps=13
    )
    rates = []
    for _ in range(13):
        optimizer.param_groups[0]["params"][0].grad = torch.full((1,), 9.0)
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4] + [x / 10 for x in range(10, 0, -1)])
    assert optimizer.param_groups[0]["params"][0].grad == 0.5
