"""SUNDAE from a masked language model: gates, losses, decoding, lengths, bad inputs."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import one_hot

from stillhouse.methods.language.unrolled_denoiser import UnrolledDenoiser, seq2seq_from_mlm
from stillhouse.recipes.language import unrolled_denoiser as recipe

transformers = pytest.importorskip("transformers")

VOCABULARY = 23


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(rows=4, source=6, target=5):
    ids = torch.randint(VOCABULARY, (rows, source), generator=seeded(1))
    mask = torch.ones_like(ids)
    labels = torch.randint(VOCABULARY, (rows, target), generator=seeded(2))
    mask[0, 4:] = 0
    labels[0, 3:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Encoder(torch.nn.Module):
    """States that are the source's ids, [B, S, 2]."""

    config = SimpleNamespace(vocab_size=VOCABULARY, hidden_size=2)

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, input_ids, attention_mask):
        states = input_ids[..., None].float().expand(-1, -1, 2)
        return SimpleNamespace(last_hidden_state=self.scale * states)


class Decoder(torch.nn.Module):
    """A function of what has been written, and a record of what that was."""

    config = SimpleNamespace(vocab_size=VOCABULARY)

    def __init__(self, function):
        super().__init__()
        self.function, self.seen = function, []

    def forward(self, ids, mask, states, source_mask):
        self.seen.append(ids)
        return self.function(ids)


def denoiser(function, max_length=8):
    return UnrolledDenoiser(Encoder(), Decoder(function), max_length)


def test_padding_of_the_source_is_not_seen(bert):
    mlm, given = bert(), batch()
    encoder, decoder = seq2seq_from_mlm(mlm)
    for cross in decoder.cross:
        cross.gate.data.fill_(1.0)
    model = UnrolledDenoiser(encoder, decoder, 8)
    other = given | {"input_ids": given["input_ids"].masked_fill(given["attention_mask"] == 0, 7)}
    losses = [model.loss(x, generator=seeded())["loss"].item() for x in (given, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


# Training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_perfect_model_has_no_loss(rate):
    """f certain of the target: L1 = L2 = 0, the first input is the target if a = 0, and the second,
    which f itself says, in any case."""
    given = batch()
    model = denoiser(lambda ids: 1e4 * one_hot(given["labels"].clamp(min=0), VOCABULARY).float())
    parts = model.loss(given, rate=rate, generator=seeded())
    assert parts["unroll_1"].item() == pytest.approx(0, abs=1e-8)
    assert parts["unroll_2"].item() == pytest.approx(0, abs=1e-8)
    assert parts["loss"].item() == pytest.approx(parts["length"].item())
    first, second = model.decoder.seen
    mask = given["labels"] >= 0
    assert torch.equal(first[mask], given["labels"][mask]) == (rate == 0)
    assert torch.equal(second[mask], given["labels"][mask])


def test_losses_are_means_over_all_tokens_and_unrolls():
    """f repeats what it sees with probability 1/2: tokens that were left alone count, too."""
    given = batch()
    share = (VOCABULARY - 1) * 0.5 / 0.5  # of the logit's exponential
    model = denoiser(lambda ids: math.log(share) * one_hot(ids, VOCABULARY).float())
    parts = model.loss(given, rate=0.5, unrolls=3, generator=seeded(4))
    mask = given["labels"] >= 0
    for number, seen in enumerate(model.decoder.seen, 1):
        right = (seen == given["labels"])[mask]
        nll = torch.where(right, math.log(2), math.log(2 * (VOCABULARY - 1)))
        assert parts[f"unroll_{number}"].item() == pytest.approx(nll.mean().item(), rel=1e-5)
    total = sum(parts[f"unroll_{number}"] for number in (1, 2, 3)) / 3 + parts["length"]
    assert parts["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    assert parts["length"].item() == pytest.approx(math.log(8), rel=1e-6)


@pytest.mark.parametrize(("rate", "share"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0), (None, 0.5)])
def test_the_share_that_is_replaced(rate, share):
    rows, n = 4000, 8
    labels = torch.full((rows, n), 5)
    given = {"input_ids": labels, "attention_mask": torch.ones_like(labels), "labels": labels}
    model = denoiser(lambda ids: torch.zeros(*ids.shape, VOCABULARY))
    model.loss(given, rate=rate, unrolls=1, generator=seeded(1))
    replaced = (model.decoder.seen[0] != 5).float().mean(1)
    # One replaced token in V is the same as before.
    assert replaced.mean().item() == pytest.approx(share * (1 - 1 / VOCABULARY), abs=0.01)
    spread = replaced.std().item() ** 2
    p = share * (1 - 1 / VOCABULARY)
    # Of one rate: binomial; of rates that are uniform: all counts are about as likely.
    if rate is None:
        assert spread > 0.08
    else:
        assert spread == pytest.approx(p * (1 - p) / n, abs=0.003)
    new = model.decoder.seen[0][model.decoder.seen[0] != 5]
    if len(new):
        counts = torch.bincount(new, minlength=VOCABULARY)
        expected = len(new) / (VOCABULARY - 1)
        others = counts[torch.arange(VOCABULARY) != 5]
        assert ((others - expected).abs() < 5 * expected**0.5).all()


def test_no_gradient_flows_through_a_sample(bert):
    """The gradient of the second unroll is that of its own logits: as with given inputs."""
    given, mlm = batch(), bert()
    model = UnrolledDenoiser(*seq2seq_from_mlm(mlm), max_length=8)
    for cross in model.decoder.cross:
        cross.gate.data.fill_(0.7)
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    parts = model.loss(given, generator=seeded())
    (parts["loss"] - parts["length"]).backward()
    found = {
        name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None
    }
    assert not any(each.requires_grad for each in seen)
    model.zero_grad()
    states = model.encoder(given["input_ids"], attention_mask=given["attention_mask"])
    mask = given["labels"] >= 0
    source = states.last_hidden_state, given["attention_mask"].bool()
    total = 0
    for ids in seen[:2]:
        logits = model.decoder(ids, mask, *source)
        total = total + torch.nn.functional.cross_entropy(logits[mask], given["labels"][mask]) / 2
    total.backward()
    for name, each in model.named_parameters():
        if name in found and not name.startswith("length"):
            assert torch.allclose(found[name], each.grad, atol=1e-5), name


def test_the_length_head_does_not_reach_the_encoder():
    model = denoiser(lambda ids: torch.zeros(*ids.shape, VOCABULARY))
    with torch.no_grad():
        model.length.weight.normal_(generator=seeded())
    parts = model.loss(batch(), generator=seeded())
    parts["length"].backward()
    assert model.encoder.scale.grad is None
    assert model.length.weight.grad.abs().max() > 0


def test_lengths_are_classes_of_the_mean_of_what_is_there():
    given = batch()
    model = denoiser(lambda ids: torch.zeros(*ids.shape, VOCABULARY))
    with torch.no_grad():
        model.length.weight.normal_(generator=seeded())
    ids, mask = given["input_ids"].double(), given["attention_mask"].double()
    mean = (ids * mask).sum(1) / mask.sum(1)
    logits = mean[:, None] * model.length.weight.detach().double().sum(1)
    n = torch.tensor([3, 5, 5, 5])
    want = -logits.log_softmax(1)[torch.arange(4), n - 1].mean()
    assert model.loss(given, generator=seeded())["length"].item() == pytest.approx(want.item())


def test_draws_are_the_generators(bert):
    given, model = batch(), UnrolledDenoiser(*seq2seq_from_mlm(bert()), max_length=8)
    losses = [model.loss(given, generator=seeded(k))["loss"].item() for k in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    state = torch.random.get_rng_state()
    model.loss(given, generator=seeded())
    model.generate(given, generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_it_learns_to_copy_backwards(bert):
    """Targets that are the source in another order: MLM, gates at 0, and 300 steps."""
    model = UnrolledDenoiser(*seq2seq_from_mlm(bert(initializer_range=0.1)), max_length=4).train()
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=3e-3), seeded()

    def draw(rows):
        ids = torch.randint(6, (rows, 3), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(1)}

    for _ in range(300):
        optimizer.zero_grad()
        model.loss(draw(32), generator=generator)["loss"].backward()
        optimizer.step()
    given = draw(100)
    said, scores = model.generate(given, steps=4, lengths=2, generator=generator)
    right = [x.tolist() == y.tolist() for x, y in zip(said, given["labels"], strict=True)]
    assert sum(right) > 80
    assert model.training
    assert scores[torch.tensor(right)].mean() > -0.5


# Decoding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["argmax_unrolled", "sample"])
def test_the_best_of_the_likeliest_lengths(mode):
    """f is surer of shorter targets: of the two likeliest lengths the shorter one wins."""
    given = batch()
    prefers = torch.tensor([2.0, 0.0, 5.0, 1.0, 4.0, 0.0, 0.0, 0.0])

    def surer_when_short(ids):
        n = (model.decoder.mask).sum(1)
        return one_hot(n, VOCABULARY)[:, None].expand(*ids.shape, -1) * (9.0 - n[:, None, None])

    class Watching(Decoder):
        def forward(self, ids, mask, states, source_mask):
            self.mask = mask
            return super().forward(ids, mask, states, source_mask)

    model = UnrolledDenoiser(Encoder(), Watching(surer_when_short), 8)
    with torch.no_grad():
        model.length.bias.copy_(prefers)
    options = dict(steps=30, mode=mode, share=0.9, temperature=0.01, generator=seeded())
    said, scores = model.generate(given, lengths=2, **options)
    assert [x.tolist() for x in said] == [[3, 3, 3]] * 4
    want = math.log(math.exp(6) / (math.exp(6) + VOCABULARY - 1))
    assert scores.tolist() == pytest.approx([want] * 4, rel=1e-4)
    said, _ = model.generate(given, lengths=3, **options)
    assert [x.tolist() for x in said] == [[1]] * 4
    # Of all lengths, where there are fewer than asked for; and lengths that are given.
    said, _ = model.generate(given, lengths=16, **options)
    assert [len(x) for x in said] == [1] * 4
    said, _ = model.generate(given, lengths=torch.tensor([8, 1, 2, 3]), **options)
    assert [x.tolist() for x in said] == [[8] * 8, [1], [2, 2], [3, 3, 3]]


def test_a_source_is_decoded_alone_as_in_a_batch(bert):
    given = batch()
    model = UnrolledDenoiser(*seq2seq_from_mlm(bert()), max_length=8)
    for cross in model.decoder.cross:
        cross.gate.data.fill_(1.0)
    n = torch.tensor([3, 5, 8, 2])
    said, scores = model.generate(given, lengths=n, steps=60, generator=seeded())
    mask = torch.arange(8) < n[:, None]
    states = model.encoder(given["input_ids"], attention_mask=given["attention_mask"])
    source = states.last_hidden_state, given["attention_mask"].bool()
    for row, (ids, score) in enumerate(zip(said, scores.tolist(), strict=True)):
        one = [x[row : row + 1] for x in source]
        logits = model.decoder(ids[None], mask[row : row + 1, : len(ids)], *one)
        logs = logits.log_softmax(-1).gather(-1, ids[None, :, None])
        assert score == pytest.approx(logs.mean().item(), abs=1e-4)


# The recipe ---------------------------------------------------------------------------------------


def test_what_is_held_out_is_read_by_no_model(monkeypatch):
    """Neither the pair nor one of its sides, which other pairs may have, too."""
    pairs = [(f"Word {i % 50}", f"Wort {i // 2}") for i in range(200)]
    monkeypatch.setattr(recipe.data, "catalog_pairs", lambda language: pairs)
    monkeypatch.setattr(recipe, "TEST", 20)
    text = recipe._Messages(seed=0)
    assert len(text.test) == 20
    held = {side for pair in text.test for side in pair}
    assert len(held) > 20
    trained = {side for pair in text.train for side in pair} | set(text.single)
    assert trained
    assert not held & trained
    assert recipe._Messages(seed=0).test == text.test != recipe._Messages(seed=1).test


def test_f1_counts_a_token_as_often_as_it_is_there():
    assert recipe._f1([1, 1, 2], [1, 3]) == pytest.approx(2 * 1 / 5)
    assert recipe._f1([1, 1, 2], [2, 1, 1]) == 1
    assert recipe._f1([4], [1, 3]) == 0


# What cannot be -----------------------------------------------------------------------------------


def test_halves_that_do_not_fit(bert):
    encoder, decoder = seq2seq_from_mlm(bert())
    other = seq2seq_from_mlm(bert(vocab_size=24))[1]
    with pytest.raises(ValueError, match="the encoder knows 23 tokens and the decoder 24"):
        UnrolledDenoiser(encoder, other)
    for length in (0, 13):
        with pytest.raises(ValueError, match=re.escape(f"must lie in [1, 12], got {length}")):
            UnrolledDenoiser(encoder, decoder, length)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (dict(labels=torch.full((4, 9), 1)), {}, "lengths must lie in [1, 8], got [9, 9, 9, 9]"),
        (dict(labels=torch.full((4, 2), -100)), {}, "lengths must lie in [1, 8], got [0, 0, 0, 0]"),
        (dict(labels=torch.tensor([[-100, 1]] * 4)), {}, "-100 behind the target only"),
        (dict(attention_mask=torch.zeros(4, 6)), {}, "a source without a token"),
        ({}, dict(unrolls=0), "expected unrolls >= 1 and a rate in [0, 1], got 0, None"),
        ({}, dict(rate=1.5), "expected unrolls >= 1 and a rate in [0, 1], got 2, 1.5"),
    ],
)
def test_losses_that_cannot_be(change, options, message):
    model = denoiser(lambda ids: torch.zeros(*ids.shape, VOCABULARY))
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        model.loss(batch() | change, generator=seeded(), **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lengths=0), "lengths must be at least 1, got 0"),
        (dict(lengths=torch.tensor([9, 1, 1, 1])), "lengths must lie in [1, 8], got [9, 1, 1, 1]"),
        (dict(lengths=torch.tensor([0, 1, 1, 1])), "lengths must lie in [1, 8], got [0, 1, 1, 1]"),
        (dict(steps=0), "got 0, 0.3, 0.3"),
        (dict(temperature=0.0), "temperature > 0 and a share in (0, 1], got 10, 0.0, 0.3"),
        (dict(share=0.0), "got 10, 0.3, 0.0"),
        (dict(mode="beam"), "mode must be 'argmax_unrolled' or 'sample', got 'beam'"),
    ],
)
def test_decodings_that_cannot_be(options, message):
    model = denoiser(lambda ids: torch.zeros(*ids.shape, VOCABULARY))
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        model.generate(batch(), generator=seeded(), **options)
    assert "\n" not in str(raised.value)
