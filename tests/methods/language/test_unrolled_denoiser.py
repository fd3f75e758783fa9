"""SUNDAE from a masked language model: gates, losses, decoding, lengths, bad inputs."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import one_hot

from stillhouse.methods.language.unrolled_decoding import refine, sample
from stillhouse.methods.language.unrolled_denoiser import UnrolledDenoiser, seq2seq_from_mlm

transformers = pytest.importorskip("transformers")

VOCABULARY = 23


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bert(seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(intermediate_size=24, max_position_embeddings=12, initializer_range=0.3)
    return transformers.BertForMaskedLM(transformers.BertConfig(**(sizes | options))).eval()


def electra():
    torch.manual_seed(0)
    config = transformers.ElectraConfig(
        vocab_size=VOCABULARY, embedding_size=16, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=24, max_position_embeddings=12,
    )  # fmt: skip
    return transformers.ElectraForMaskedLM(config).eval()


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


# A masked language model as both halves -----------------------------------------------------------


@pytest.mark.parametrize("make", [bert, electra])
def test_gates_at_0_are_the_masked_model_whatever_the_source(make):
    mlm, given = make(), batch()
    encoder, decoder = seq2seq_from_mlm(mlm)
    ids, mask = given["labels"].clamp(min=0), given["labels"] >= 0
    want = mlm(input_ids=ids, attention_mask=mask.long()).logits
    for source in (given["input_ids"], given["input_ids"].flip(1)):
        states = encoder(source, attention_mask=given["attention_mask"]).last_hidden_state
        found = decoder(ids, mask, states, given["attention_mask"].bool())
        assert torch.equal(found, want)
        with torch.no_grad():
            for cross in decoder.cross:
                cross.gate.fill_(0.5)
        assert not torch.allclose(decoder(ids, mask, states, mask[:, :1].expand(-1, 6)), want)
        with torch.no_grad():
            for cross in decoder.cross:
                cross.gate.zero_()


def test_the_halves_are_copies():
    mlm = bert()
    encoder, decoder = seq2seq_from_mlm(mlm)
    own = {id(each) for each in mlm.parameters()}
    for half in (encoder, decoder):
        assert not own & {id(each) for each in half.parameters()}
    assert not hasattr(encoder, "cls")
    attention = mlm.bert.encoder.layer[1].attention
    cross = decoder.cross[1]
    for copied, of in (
        (cross.query, attention.self.query),
        (cross.key, attention.self.key),
        (cross.value, attention.self.value),
        (cross.output, attention.output.dense),
    ):
        assert torch.equal(copied.weight, of.weight)
        assert torch.equal(copied.bias, of.bias)
        assert copied.weight is not of.weight


def test_cross_attention_of_the_text_itself_is_self_attention():
    """With a gate of 1 and the block's own input as the source: what self-attention adds."""
    mlm = bert()
    _, decoder = seq2seq_from_mlm(mlm)
    block, cross = mlm.bert.encoder.layer[0].attention, decoder.cross[0]
    x = torch.randn(3, 5, 16, generator=seeded())
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    added = block.output.dense(block.self(x, attention_mask=mask[:, None, None, :])[0])
    with torch.no_grad():
        cross.gate.fill_(1)
    assert torch.allclose(cross(x, x, mask), added, atol=1e-5)


def test_what_a_block_adds_comes_behind_its_attention():
    """By hand, block by block, with gates of 0.5."""
    mlm, given = bert(), batch()
    encoder, decoder = seq2seq_from_mlm(mlm)
    ids, mask = given["labels"].clamp(min=0), given["labels"] >= 0
    source_mask = given["attention_mask"].bool()
    states = encoder(given["input_ids"], attention_mask=source_mask.long()).last_hidden_state
    x = mlm.bert.embeddings(ids)
    with torch.no_grad():
        for layer, cross in zip(mlm.bert.encoder.layer, decoder.cross, strict=True):
            cross.gate.fill_(0.5)
            x = layer.attention(x, attention_mask=mask[:, None, None, :])[0]
            x = x + cross(x, states, source_mask)
            x = layer.output(layer.intermediate(x), x)
        found = decoder(ids, mask, states, source_mask)
    assert torch.allclose(found[mask], mlm.cls(x)[mask], atol=1e-5)


def test_padding_of_the_source_is_not_seen():
    mlm, given = bert(), batch()
    encoder, decoder = seq2seq_from_mlm(mlm)
    for cross in decoder.cross:
        cross.gate.data.fill_(1.0)
    model = UnrolledDenoiser(encoder, decoder, 8)
    other = given | {"input_ids": given["input_ids"].masked_fill(given["attention_mask"] == 0, 7)}
    losses = [model.loss(x, generator=seeded())["loss"].item() for x in (given, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


# Training -----------------------------------------------------------------------------------------


def test_a_perfect_model_of_a_whole_target_has_no_loss():
    """a = 0 and f certain of the target: L1 = L2 = 0, and the second input is the first."""
    given = batch()
    model = denoiser(lambda ids: 1e4 * one_hot(given["labels"].clamp(min=0), VOCABULARY).float())
    parts = model.loss(given, rate=0.0, generator=seeded())
    assert parts["unroll_1"].item() == pytest.approx(0, abs=1e-8)
    assert parts["unroll_2"].item() == pytest.approx(0, abs=1e-8)
    assert parts["loss"].item() == pytest.approx(parts["length"].item())
    first, second = model.decoder.seen
    mask = given["labels"] >= 0
    assert torch.equal(first[mask], given["labels"][mask])
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


def test_no_gradient_flows_through_a_sample():
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


def test_draws_are_the_generators():
    given, model = batch(), UnrolledDenoiser(*seq2seq_from_mlm(bert()), max_length=8)
    losses = [model.loss(given, generator=seeded(k))["loss"].item() for k in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    state = torch.random.get_rng_state()
    model.loss(given, generator=seeded())
    model.generate(given, generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_it_learns_to_copy_backwards():
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


def table(seed=0, width=5):
    """Logits that depend on the token itself and on the one to its left."""
    weight = torch.randn(width, width, width, generator=seeded(seed))
    return lambda y: weight[y, y.roll(1, 1)]


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_argmax_unrolled_by_hand(share, steps):
    logits_of = table()
    y = torch.randint(5, (6, 7), generator=seeded(3))
    lengths = torch.tensor([7, 7, 3, 1, 5, 4])
    mask = torch.arange(7) < lengths[:, None]
    found = refine(logits_of, y, mask, steps=steps, share=share, generator=seeded())
    for _ in range(steps):
        probabilities = logits_of(y).softmax(-1)
        likeliest = probabilities.argmax(-1)
        then = logits_of(likeliest).argmax(-1)
        y = likeliest.clone()
        for row, n in enumerate(lengths.tolist()):
            order = sorted(range(n), key=lambda i: probabilities[row, i].max().item())
            for i in order[: math.ceil(share * n)]:
                y[row, i] = then[row, i]
    assert torch.equal(found[mask], y[mask])


def test_a_perfect_model_needs_one_step():
    target = torch.tensor([[3, 1, 4, 1]])
    calls = []

    def certain(y):
        calls.append(y)
        return 9.0 * one_hot(target, 5)

    y = torch.zeros_like(target)
    found = refine(certain, y, target >= 0, steps=50, generator=seeded())
    assert torch.equal(found, target)
    # The second step changes nothing: it is the last.
    assert len(calls) == 4


def test_sampling_updates_a_share_of_the_tokens():
    y = torch.zeros(200, 50, dtype=torch.int64)
    mask = torch.arange(50) < torch.tensor([50, 20]).repeat(100)[:, None]
    other = lambda y: 9.0 * one_hot(torch.ones_like(y), 5)  # noqa: E731
    found = refine(other, y, mask, steps=1, mode="sample", share=0.3, generator=seeded())
    assert not found[~mask].any()
    assert found[mask].float().mean().item() == pytest.approx(0.3, abs=0.02)
    again = refine(other, y, mask, steps=3, mode="sample", share=0.3, generator=seeded())
    assert again[mask].float().mean().item() == pytest.approx(1 - 0.7**3, abs=0.02)


@pytest.mark.parametrize(("steps", "calls"), [(4, 4), (10, 10), (40, 10)])
def test_sampling_ends_after_ten_steps_where_nothing_changes(steps, calls):
    seen = []

    def certain(y):
        seen.append(y)
        return 99.0 * one_hot(torch.full_like(y, 2), 5)

    y = torch.full((1, 3), 2)
    refine(certain, y, y > 0, steps=steps, mode="sample", generator=seeded())
    assert len(seen) == calls


def test_samples_follow_the_softmax_at_their_temperature():
    logits = torch.tensor([0.0, 1.0, -1.0])
    drawn = sample(logits.expand(100, 200, 3), 0.4, seeded())
    frequencies = torch.bincount(drawn.flatten(), minlength=3) / drawn.numel()
    assert torch.allclose(frequencies, (logits / 0.4).softmax(0), atol=0.01)
    assert drawn.shape == (100, 200)


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


def test_a_source_is_decoded_alone_as_in_a_batch():
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


# What cannot be -----------------------------------------------------------------------------------


def test_halves_that_do_not_fit():
    encoder, decoder = seq2seq_from_mlm(bert())
    other = seq2seq_from_mlm(bert(vocab_size=24))[1]
    with pytest.raises(ValueError, match="the encoder knows 23 tokens and the decoder 24"):
        UnrolledDenoiser(encoder, other)
    for length in (0, 13):
        with pytest.raises(ValueError, match=re.escape(f"must lie in [1, 12], got {length}")):
            UnrolledDenoiser(encoder, decoder, length)


def test_models_that_are_no_masked_ones(llama):
    with pytest.raises(ValueError, match="LlamaDecoderLayer has not BERT's layout"):
        seq2seq_from_mlm(llama())
    with pytest.raises(ValueError, match="BertModel has no output head: pass a masked LM"):
        seq2seq_from_mlm(bert().bert)
    with pytest.raises(ValueError, match="this one has is_decoder=True"):
        seq2seq_from_mlm(bert(is_decoder=True))


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
