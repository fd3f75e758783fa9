"""Recurrence between windows: against the model's own cache, truncation, losses, bad inputs."""

import copy
import re

import pytest
import torch
from torch.nn.functional import cross_entropy, gelu

from stillhouse.methods.language.window_recurrence import WindowRecurrence
from stillhouse.train import supervised_rows
from stillhouse.train.forward import RowForward

transformers = pytest.importorskip("transformers")

WINDOW, TOKENS = 4, 11
WIDTH = 32

# transformers 5 has two names for the cache: the one that all of its versions know is deprecated.
ignoring_names = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")


def gpt2(**options):
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=259, n_embd=WIDTH, n_layer=3, n_head=4, n_positions=16, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        **options,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.bias.normal_(0, 0.3)
    return model


@pytest.fixture
def models(llama):
    """Of three blocks each."""
    return {"llama": lambda **options: llama(3, **options), "gpt2": gpt2}


def batch(rows=3, tokens=TOKENS, seed=0):
    ids = torch.randint(259, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def recurrent(lm, layer_out=1, layer_in=None, **options):
    """With a second matrix that is not 0."""
    model = WindowRecurrence(lm, layer_out, layer_in, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.second.copy_(torch.randn(model.second.shape, generator=generator) / 4)
    return model


def projections(block):
    """The key and value of inputs [B, D] of the block's attention, without a position: [B, D]."""
    if hasattr(block, "self_attn"):
        return lambda r: (block.self_attn.k_proj(r), block.self_attn.v_proj(r))
    return lambda r: block.attn.c_attn(r).split(WIDTH, -1)[1:]


def by_cache(lm, ids, r):
    """The model's own forward with one key and value more in its cache, positions from 0 on."""
    cache = transformers.DynamicCache()
    path = lm.model.layers if hasattr(lm, "model") else lm.transformer.h
    for number, block in enumerate(path):
        pair = (
            x.unflatten(-1, (-1, WIDTH // 4)).transpose(0, 1)[:, :, None].transpose(0, 1)
            for x in projections(block)(r)
        )
        cache.update(*pair, number)
    return lm(
        input_ids=ids,
        past_key_values=cache,
        position_ids=torch.arange(ids.shape[1])[None],
        attention_mask=torch.ones(len(ids), ids.shape[1] + 1, dtype=torch.long),
        output_hidden_states=True,
    )


@torch.no_grad()
def by_hand(model, lm, given, layer_out):
    """-log q of each target, window after window, by the cache: float32 [B, T]."""
    ids = given["input_ids"]
    result = torch.zeros(ids.shape)
    mean = None
    for start in range(0, ids.shape[1] - 1, WINDOW):
        read = ids[:, start : min(start + WINDOW, ids.shape[1] - 1)]
        if mean is None:
            output = lm(input_ids=read, output_hidden_states=True)
        else:
            output = by_cache(lm, read, gelu(mean @ model.first.T) @ model.second.T)
        mean = output.hidden_states[layer_out].mean(1)
        for i in range(read.shape[1]):
            nll = cross_entropy(output.logits[:, i], ids[:, start + i + 1], reduction="none")
            result[:, start + i + 1] = nll
    return result


@ignoring_names
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("layer_out", [0, 1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_slot_is_one_more_key_and_value_in_the_cache(models, name, layer_out, attention):
    lm = models[name](attn_implementation=attention)
    model, given = recurrent(lm, layer_out), batch()
    want = by_hand(model, lm, given, layer_out)
    assert torch.allclose(model.score(given, window=WINDOW), want, atol=2e-5)
    without = WindowRecurrence(lm, layer_out, ()).score(given, window=WINDOW)
    assert (without - want)[:, WINDOW + 1 :].abs().min() > 1e-4


@ignoring_names
def test_the_second_matrix_at_0_is_a_key_and_value_of_0(llama):
    lm, given = llama(), batch()
    model = WindowRecurrence(lm, 1)
    assert not model.second.any()
    want = by_hand(model, lm, given, 1)
    assert torch.allclose(model.score(given, window=WINDOW), want, atol=2e-5)


@pytest.mark.parametrize("layer_in", [0, 1, [1], range(2)])
def test_blocks_that_get_it(llama, layer_in):
    """What is changed before block k is that of no block before it."""
    lm, given = llama(), batch()
    numbers = [layer_in] if isinstance(layer_in, int) else list(layer_in)
    seen = []
    for number, block in enumerate(lm.model.layers):
        block.self_attn.k_proj.register_forward_hook(
            lambda module, args, output, number=number: seen.append((number, output.shape[1]))
        )
    recurrent(lm, 1, layer_in).score(given, window=WINDOW)
    second_window = [(k, WINDOW + (k in numbers)) for k in range(2)]
    # The first call is a look at one token; the first window has no slot.
    assert seen[-4:-2] == second_window
    assert (1, WINDOW) in seen


def test_one_window_is_the_model_itself(llama):
    lm, given = llama(), batch()
    logits = lm(input_ids=given["input_ids"]).logits
    want = cross_entropy(logits[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten())
    model = recurrent(lm)
    assert model.loss(given, window=TOKENS).item() == pytest.approx(want.item(), abs=1e-5)
    assert model.score(given, window=64)[:, 0].abs().max() == 0


def test_windows_without_recurrence_are_texts_of_their_own(llama):
    lm, given = llama(), batch(tokens=9)
    plain = WindowRecurrence(lm, 1, ()).score(given, window=WINDOW)
    whole = WindowRecurrence(lm, 1)
    parts = []
    for start in (0, WINDOW):
        part = {name: each[:, start : start + WINDOW + 1] for name, each in given.items()}
        parts.append(whole.score(part, window=WINDOW)[:, 1:])
    assert torch.allclose(plain[:, 1:], torch.cat(parts, 1), atol=1e-5)


def test_windows_that_overlap(llama):
    """A target is said by the last window that begins before it with `overlap` tokens to read."""
    lm, given = llama(), batch(tokens=12)
    ids, overlap = given["input_ids"], 2
    want = torch.zeros(ids.shape)
    for target in range(1, 12):
        start = max(0, (target - 1 - overlap) // (WINDOW - overlap) * (WINDOW - overlap))
        logits = lm(input_ids=ids[:, start:target]).logits[:, -1]
        want[:, target] = cross_entropy(logits, ids[:, target], reduction="none")
    model = WindowRecurrence(lm, 1, ())
    assert torch.allclose(model.score(given, window=WINDOW, overlap=overlap), want, atol=1e-5)


def test_padding_and_labels_that_do_not_count(llama):
    """A shorter row is what it is alone, and the mean is over the targets."""
    lm, given = llama(), batch()
    model = recurrent(lm)
    short = {name: each[:1, :6].clone() for name, each in given.items()}
    alone = model.score(short, window=WINDOW)
    given["attention_mask"][0, 6:] = 0
    given["labels"][0, 6:] = -100
    given["labels"][1, :3] = -100
    together = model.score(given, window=WINDOW)
    assert torch.allclose(together[0, :6], alone[0], atol=1e-5)
    assert together[0, 6:].abs().max() == 0
    assert together[1, :3].abs().max() == 0
    count = 5 + 8 + 10
    loss = model.loss(given, window=WINDOW)
    assert loss.item() == pytest.approx(together.sum().item() / count, abs=1e-5)


def test_a_mean_is_over_the_tokens_that_there_are(llama):
    """Of a window that is half padding: whatever the padding says."""
    lm, given = llama(), batch()
    given["attention_mask"][:, 3:] = 0
    model, means = recurrent(lm), []
    for filler in (0, 7):
        ids = given["input_ids"].masked_fill(given["attention_mask"] == 0, filler)
        rows, index = RowForward(lm), supervised_rows(ids[:, :WINDOW])
        means.append(
            model._window(rows, ids[:, :WINDOW], given["attention_mask"][:, :4], index, None)
        )
    assert torch.equal(means[0][1], means[1][1])
    states = lm(input_ids=ids[:, :3], output_hidden_states=True).hidden_states[1]
    assert torch.allclose(means[0][1], states.mean(1), atol=1e-5)


# Gradients ----------------------------------------------------------------------------------------


def gradients(model, given, **options):
    model.zero_grad()
    model.loss(given, window=WINDOW, **options).backward()
    return [each.grad.clone() for each in model.parameters()]


@pytest.mark.parametrize("bptt", [1, 2, 9])
def test_windows_made_again_in_the_backward_pass_change_nothing(llama, bptt):
    lm = llama(attention_dropout=0.0)
    model = recurrent(lm).train()
    kept = gradients(model, batch(), bptt=bptt, checkpointing=False)
    again = gradients(model, batch(), bptt=bptt)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(kept, again, strict=True))
    assert all(each.abs().max() > 0 for each in kept)


@pytest.mark.parametrize(("bptt", "cut"), [(2, [2]), (1, [1, 2, 3]), (3, [3])])
def test_truncation(llama, bptt, cut):
    """As with means that are cut off by hand, before the windows `cut`; W1 learns from these, too,
    and with all of them cut the model learns from each window's own tokens."""
    model, given = recurrent(llama()), batch(tokens=4 * WINDOW + 1)
    found = gradients(model, given, bptt=bptt, checkpointing=False)
    whole = gradients(model, given, bptt=9, checkpointing=False)
    inner, numbers = model._window, iter(range(4))

    def cut_here(*inputs):
        *inputs, mean = inputs
        return inner(*inputs, mean.detach() if next(numbers) in cut else mean)

    model._window = cut_here
    by_hand = gradients(model, given, bptt=9, checkpointing=False)
    assert all(torch.equal(a, b) for a, b in zip(found, by_hand, strict=True))
    assert not all(torch.allclose(a, b) for a, b in zip(found, whole, strict=True))
    assert model.first.grad.abs().max() > 0


def test_gradients_by_differences():
    """Of a float64 model (a Llama's norms are float32), through all windows."""
    lm = gpt2().double()
    model, given = recurrent(lm, 0), batch(rows=1)
    model.loss(given, window=WINDOW, bptt=9).backward()
    generator = torch.Generator().manual_seed(3)
    for parameter in (model.first, model.second, lm.transformer.wte.weight):
        way = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += step * way
                values.append(model.loss(given, window=WINDOW).item())
                parameter -= step * way
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx((parameter.grad * way).sum().item(), rel=1e-4)


def test_a_model_learns_to_remember(llama):
    """Tokens that only the window before tells: the first half of a text comes again."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    losses = {}
    for layer_in in (None, ()):
        model = WindowRecurrence(llama(layers=1, vocab_size=16), 1, layer_in).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            ids = torch.randint(8, (32, 1), generator=generator).repeat(1, 5)
            ids[:, 1:3] = 9
            ids[:, 4] = ids[:, 0]
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            labels = ids.clone()
            labels[:, :4] = -100
            optimizer.zero_grad()
            # Windows (x 9) (9 x) x ...: the last target needs what the first window read.
            ids[:, 3] = 9
            loss = model.loss(given | {"labels": labels}, window=2)
            loss.backward()
            optimizer.step()
        losses[layer_in] = loss.item()
    assert losses[None] < 0.5 < 1.5 < losses[()]


def test_the_model_is_left_as_it_was(llama):
    lm = llama().train()
    model, given = recurrent(lm), batch()
    before = lm(input_ids=given["input_ids"]).logits
    model.loss(given, window=WINDOW).backward()
    model.score(given, window=WINDOW)
    assert lm.training
    assert torch.equal(lm(input_ids=given["input_ids"]).logits, before)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in lm.modules())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.second.zero_()
    assert not torch.equal(twin.score(given, window=4), model.score(given, window=4))


def test_scores_are_those_of_evaluation_mode(llama):
    model, given = recurrent(llama(attention_dropout=0.5)), batch()
    want = model.score(given, window=WINDOW)
    model.train()
    assert torch.equal(model.score(given, window=WINDOW), want)
    assert model.lm.training
    assert not torch.equal(model(given, window=WINDOW), want)
    assert not want.requires_grad


# What cannot be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, None), "layer_out must lie in [0, 2], got 3"),
        ((-1, None), "layer_out must lie in [0, 2], got -1"),
        ((1, 2), "layer_in must name blocks of 0 to 1, got [2]"),
        ((1, [0, -1]), "layer_in must name blocks of 0 to 1, got [0, -1]"),
        ((1, None, 0), "hidden must be at least 1, got 0"),
    ],
)
def test_models_that_cannot_be(llama, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WindowRecurrence(llama(), *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(window=0), "window and bptt must be at least 1, got 0 and 2"),
        (dict(window=4, bptt=0), "window and bptt must be at least 1, got 4 and 0"),
        (dict(window=129), "a window of 129 tokens: the model has 128 positions"),
        (dict(window=4, overlap=4), "overlap must lie in [0, 4), got 4"),
        (dict(window=4, overlap=-1), "overlap must lie in [0, 4), got -1"),
    ],
)
def test_windows_that_cannot_be(llama, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        WindowRecurrence(llama(), 1).loss(batch(), **options)
    assert "\n" not in str(raised.value)


def test_batches_that_cannot_be(llama):
    model, given = WindowRecurrence(llama(), 1), batch()
    given["attention_mask"][1, :2] = 0
    with pytest.raises(ValueError, match="padded on the left"):
        model.loss(given, window=4)
    with pytest.raises(ValueError, match="a batch of one token has nothing to predict"):
        model.loss(batch(tokens=1), window=4)
