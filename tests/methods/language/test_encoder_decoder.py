"""The small encoder-decoder: its attention against numpy's arithmetic, its cache, its padding."""

import dataclasses
import doctest
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from stillhouse.methods.language import (
    EncoderDecoder,
    EncoderDecoderConfig,
    encoder_decoder,
    encoder_decoder_config,
    layer_split,
)
from stillhouse.methods.language.encoder_decoder_blocks import (
    Attention,
    KeyValues,
    rotate,
    rotation,
)

CONFIG = EncoderDecoderConfig(
    23, width=16, encoder_layers=3, decoder_layers=2, heads=4, kv_heads=2, head_size=4, ffn=24
)
SOURCE = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
TARGET = torch.tensor([[1, 3, 4, 5], [1, 20, 21, 22]])


@pytest.fixture
def model():
    return EncoderDecoder(CONFIG, seed=1).double().eval()


def no_token_twice(ids, scores):
    """A logits processor; without it the likeliest tokens of random weights are soon all alike."""
    return scores.scatter(1, ids, -torch.inf)


VARIED = dict(logits_processor=[no_token_twice])


def logits(model, source=SOURCE, mask=MASK, target=TARGET):
    return model(source, mask, target).logits


# Attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_weighted_mean_of_values(interleaved, causal):
    """Head by head, row by row, with the key head that either order gives."""
    config = dataclasses.replace(CONFIG, interleaved=interleaved)
    attention = Attention(config).double()
    x = torch.randn(2, 5, 16).double()
    positions = torch.arange(5)
    angles = rotation(positions, 4, 1e4)
    k, v = attention.keys_values(x, angles)
    found = attention(x, (k, v), angles, causal=causal)
    q = rotate(attention.q(x).view(2, 5, 4, 4).transpose(1, 2), angles)
    heads = torch.zeros(2, 5, 4, 4).double()
    for b, head, i in itertools.product(range(2), range(4), range(5)):
        shared = head // 2 if interleaved else head % 2
        read = i + 1 if causal else 5
        weights = (k[b, shared, :read] @ q[b, head, i] / 2).softmax(0)  # 2 = sqrt of the head
        heads[b, i, head] = weights @ v[b, shared, :read]
    torch.testing.assert_close(found, attention.o(heads.flatten(2)))


def test_rotation_turns_pairs_by_the_angles_of_the_paper():
    x = torch.randn(1, 1, 1, 6).double()
    found = rotate(x, rotation(torch.tensor([7]), 6, 100.0))[0, 0, 0]
    for pair in range(3):
        angle = 7 * 100.0 ** (-2 * pair / 6)
        a, b = x[0, 0, 0, pair].item(), x[0, 0, 0, pair + 3].item()
        assert found[pair].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle))
        assert found[pair + 3].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle))


def test_ntk_stretches_the_slowest_wave_by_its_factor_and_leaves_the_fastest():
    plain, stretched = (rotation(torch.tensor([1]), 8, 1e4, ntk)[1] for ntk in (1.0, 4.0))
    assert stretched[0, 0] == plain[0, 0]
    assert stretched[0, -1].asin() == pytest.approx(plain[0, -1].asin().item() / 4)


# The model ----------------------------------------------------------------------------------------


def test_a_padded_source_is_the_source_alone(model):
    padded = logits(model)
    alone = logits(model, SOURCE[1:, :3], None, TARGET[1:])
    torch.testing.assert_close(padded[1:], alone)
    wider = torch.nn.functional.pad(SOURCE, (0, 7), value=4)
    torch.testing.assert_close(logits(model, wider, torch.nn.functional.pad(MASK, (0, 7))), padded)


def test_the_encoder_looks_both_ways_and_the_decoder_back(model):
    def changed(**inputs):
        return (logits(model, **inputs) - logits(model)).abs().amax((0, 2))

    for column in range(5):  # each source token reaches every target row
        source = SOURCE.clone()
        source[0, column] = 13
        assert (changed(source=source) > 1e-6).all()
    target = TARGET.clone()
    target[:, 2] = 14
    difference = changed(target=target)
    assert (difference[:2] == 0).all()
    assert (difference[2:] > 1e-6).all()
    # It is no bag of tokens: their order counts.
    whole, flipped = SOURCE[:1], SOURCE[:1].flip(1)
    pair = (logits(model, each, None, TARGET[:1]) for each in (whole, flipped))
    assert (torch.sub(*pair).abs().amax((0, 2)) > 1e-6).all()


def test_only_differences_of_positions_count_in_the_encoder(model):
    """Where the centre is does not matter: RoPE is relative."""
    torch.testing.assert_close(
        model.encode(SOURCE[:1].flip(1)),
        model.encode(
            torch.nn.functional.pad(SOURCE[:1].flip(1), (4, 0)),
            torch.tensor([[0] * 4 + [1] * 5]),
        )[:, 4:],
    )


def test_generation_with_the_cache_is_generation_without(model):
    found = model.generate(SOURCE, MASK, max_new_tokens=12, eos_token_id=(), **VARIED)
    ids = torch.full((2, 1), CONFIG.decoder_start_token_id)
    for _ in range(12):
        scores = no_token_twice(ids, logits(model, target=ids)[:, -1])
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert found.tolist() == ids.tolist()
    assert found[0].tolist() != found[1].tolist()


def test_cached_logits_are_the_logits(model):
    memory = model.encode(SOURCE, MASK)
    cache = model.remember(memory, MASK, room=4)
    steps = [model.decode(part, cache) for part in TARGET.split([1, 2, 1], 1)]
    torch.testing.assert_close(model.head(torch.cat(steps, 1)), logits(model))


def test_the_cache_holds_the_decoder_s_tokens_and_one_memory(model):
    cache = model.remember(model.encode(SOURCE, MASK), MASK, room=9)
    before = [id(each) for pair in cache.memory for each in pair]
    for step in range(3):
        assert cache.length == step
        model.decode(TARGET[:, step : step + 1], cache)
    assert [id(each) for pair in cache.memory for each in pair] == before
    # 2 layers, keys and values, 2 heads of 4 numbers of 8 bytes.
    assert cache.bytes_per_token == 2 * 2 * 2 * 4 * 8
    with pytest.raises(ValueError, match="a cache of 2 tokens was given 3"):
        KeyValues(2).append(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))


def test_generation_encodes_once(model, monkeypatch):
    calls = []
    own = model.encode
    monkeypatch.setattr(model, "encode", lambda *a: calls.append(1) or own(*a))
    model.generate(SOURCE, MASK, max_new_tokens=5, eos_token_id=())
    assert len(calls) == 1


def test_a_row_ends_at_its_end_and_is_padded_behind_it(model):
    free = model.generate(SOURCE, MASK, max_new_tokens=6, eos_token_id=(), **VARIED)
    end = free[0, 3].item()
    assert end not in free[1]
    options = dict(max_new_tokens=6, pad_token_id=1, **VARIED)
    found = model.generate(SOURCE, MASK, eos_token_id=end, **options)
    assert found[0].tolist() == [*free[0, :4].tolist(), 1, 1, 1]
    assert torch.equal(found[1], free[1])
    model.generation_config.eos_token_id = [end]
    assert torch.equal(model.generate(SOURCE, MASK, **options), found)
    assert model.generate(SOURCE[:1], MASK[:1], **options).shape == (1, 4)
    given = SimpleNamespace(
        max_new_tokens=6, eos_token_id=end, pad_token_id=1, decoder_start_token_id=1
    )
    assert torch.equal(model.generate(SOURCE, MASK, given, **VARIED), found)


def test_weights_are_shared_and_drawn_from_the_seed():
    state = torch.get_rng_state()
    one, same, other = (EncoderDecoder(CONFIG, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.get_output_embeddings().weight is one.embedding.weight
    assert torch.equal(logits(one.eval()), logits(same.eval()))
    assert not torch.equal(logits(one), logits(other.eval()))


def test_the_paper_s_model_has_its_size():
    with torch.device("meta"):
        model = EncoderDecoder(EncoderDecoderConfig(32128))
    count = sum(each.numel() for each in model.parameters())
    assert 3.0e8 < count < 3.5e8


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "share", "split"),
    [(30, 2 / 3, (20, 10)), (6, 1 / 2, (3, 3)), (6, 2 / 3, (4, 2)), (6, 5 / 6, (5, 1))],
)
def test_layer_split(total, share, split):
    assert layer_split(total, share) == split


@pytest.mark.parametrize(("total", "share"), [(1, 2 / 3), (6, 0.0), (6, 1.0), (0, 0.5)])
def test_a_half_without_a_layer_raises(total, share):
    with pytest.raises(ValueError, match="each needs at least one"):
        layer_split(total, share)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_layers": 0}, r"need a layer each, got \(0, 2\)"),
        ({"decoder_layers": 0}, r"need a layer each, got \(3, 0\)"),
        ({"kv_heads": 3}, "4 heads cannot share 3"),
        ({"head_size": 5}, "5 features is not even"),
        ({"dropout": 1.0}, "dropout in"),
        ({"ntk": 0.5}, "ntk >= 1"),
    ],
)
def test_sizes_that_do_not_fit_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_bad_sources_raise(model):
    with pytest.raises(ValueError, match="a source has no token"):
        logits(model, mask=torch.tensor([[1] * 5, [0] * 5]))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 4\)"):
        logits(model, mask=MASK[:, :4])
    with pytest.raises(ValueError, match="the cache is generate's"):
        model(SOURCE, MASK, TARGET, use_cache=True)


@pytest.mark.parametrize("module", [encoder_decoder, encoder_decoder_config])
def test_examples(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted
    assert not outcome.failed
