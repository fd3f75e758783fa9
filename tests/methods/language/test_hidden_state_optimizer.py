"""Gradient steps on cached states: causality, plain scores at a rate of 0, Adam as torch has it,
and what a prompt's labels reach."""

import doctest

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from stillhouse.methods.language import HiddenStateOptimizer, cached_states
from stillhouse.methods.language.cached_states import CachedStates, read
from stillhouse.train import sequence_logprobs

LENGTH, CHUNK = 21, 4


@pytest.fixture
def lm(llama):
    return llama(2).double()


@pytest.fixture
def gpt2():
    """In float64 throughout: a Llama's norms are float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    return GPT2LMHeadModel(GPT2Config(vocab_size=259, **sizes)).double().eval()


@pytest.fixture
def ids():
    return torch.randint(0, 259, (LENGTH,), generator=torch.Generator().manual_seed(1))


def plain(lm, ids):
    """-log p of each token from one forward of the whole."""
    batch = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    return -sequence_logprobs(lm, {**batch, "labels": ids[None]}, reduction="none")[0].detach()


def test_a_rate_of_0_is_the_plain_model(lm, ids):
    found = HiddenStateOptimizer(lm, lr=0.0, chunk=CHUNK).score(ids)
    torch.testing.assert_close(found, plain(lm, ids), rtol=0, atol=1e-6)
    learned = HiddenStateOptimizer(lm, lr=0.03, chunk=CHUNK).score(ids)
    assert (learned - found).abs().max() > 0.01
    # The first chunk has nothing to learn in, and the second was predicted before it learned.
    torch.testing.assert_close(learned[: CHUNK + 1], found[: CHUNK + 1])
    assert (learned[2 * CHUNK + 1 :] != found[2 * CHUNK + 1 :]).all()


@pytest.mark.parametrize("t", [1, 4, 5, 9, 14, 20])
def test_no_prediction_knows_of_a_later_token(lm, ids, t):
    optimizer = HiddenStateOptimizer(lm, lr=0.03, chunk=CHUNK)
    changed = ids.clone()
    changed[t] = (ids[t] + 1) % 259
    before, after = optimizer.score(ids), optimizer.score(changed)
    assert torch.equal(before[:t], after[:t])
    assert (before[t:] != after[t:]).all()


def test_it_is_torchs_adam_with_a_count_for_each_state(lm, ids):
    """Each chunk's states are parameters with an Adam of their own, which is how moments travel."""
    chunks = list(range(0, LENGTH - 1, CHUNK))
    parts, optimizers, nll = [], [], [torch.zeros(1, dtype=torch.float64)]
    lm.requires_grad_(False)

    def forward(start):
        cache = DynamicCache()
        for layer in range(2 if parts else 0):
            cache.update(*(torch.cat([x[layer][i] for x in parts], 2) for i in (0, 1)), layer)
        inputs = ids[None, start : start + CHUNK]
        logits = lm(input_ids=inputs, cache=cache, use_cache=True).logits[0]
        fresh = [(x.keys[:, :, start:], x.values[:, :, start:]) for x in cache.layers]
        return cross_entropy(logits, ids[start + 1 : start + CHUNK + 1], reduction="none"), fresh

    for start in chunks:
        loss, fresh = forward(start)
        nll.append(loss.detach())
        if optimizers:
            loss.sum().backward()
            leaves = [each for part in parts for pair in part for each in pair]
            torch.nn.utils.clip_grad_norm_(leaves, 0.5)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                _, fresh = forward(start)
        own = [[each.detach().clone().requires_grad_() for each in pair] for pair in fresh]
        parts.append(own)
        leaves = [each for pair in own for each in pair]
        optimizers.append(torch.optim.Adam(leaves, lr=0.03, betas=(0.8, 0.95)))
    options = dict(lr=0.03, chunk=CHUNK, betas=(0.8, 0.95), clip=0.5)
    found = HiddenStateOptimizer(lm, **options).score(ids)
    torch.testing.assert_close(found, torch.cat(nll), rtol=1e-5, atol=1e-5)


def test_rows_know_nothing_of_each_other(lm, ids):
    rows = torch.stack([ids, ids.flip(0), (ids * 7) % 259])
    optimizer = HiddenStateOptimizer(lm, lr=0.03, chunk=CHUNK, clip=0.1)
    each = torch.stack([optimizer.score(row) for row in rows])
    torch.testing.assert_close(optimizer.score(rows), each)


def test_memory_is_a_band_of_the_attention(lm, ids):
    """With a rate of 0: a token sees its chunk up to itself and so many states before the chunk."""
    memory = 6
    found = HiddenStateOptimizer(lm, lr=0.0, chunk=CHUNK, memory=memory).score(ids)
    row = torch.arange(LENGTH - 1)[:, None]
    column, start = row.T, row // CHUNK * CHUNK
    seen = (column <= row) & (column >= start - memory)
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    logits = lm(input_ids=ids[None, :-1], attention_mask=mask[None, None]).logits[0]
    want = cross_entropy(logits, ids[1:], reduction="none")
    torch.testing.assert_close(found[1:], want.detach())
    assert (found - plain(lm, ids)).abs().max() > 1e-3


def test_moments_travel_with_their_states():
    options = dict(lr=0.1, betas=(0.9, 0.99), clip=float("inf"))
    old = CachedStates.of(torch.zeros(2, 1, 1, 3, 2), torch.tensor([5]))
    gradient = torch.arange(12.0).view(2, 1, 1, 3, 2) + 1
    old = old.step(gradient, **options)
    # The first step of Adam is the sign.
    torch.testing.assert_close(old.states, torch.full_like(old.states, -0.1))
    both = old.append(CachedStates.of(torch.ones(2, 1, 1, 2, 2), torch.tensor([6]))).newest(4)
    assert both.updates.tolist() == [1, 1, 0, 0]
    assert (both.offset, len(both), both.last.tolist()) == (1, 4, [6])
    torch.testing.assert_close(both.first[..., :2, :], 0.1 * gradient[..., 1:, :])
    torch.testing.assert_close(both.second[..., :2, :], 0.01 * gradient[..., 1:, :] ** 2)
    assert not both.first[..., 2:, :].any()
    after = both.step(torch.ones_like(both.first), **options)
    torch.testing.assert_close(after.states[..., 2:, :], torch.full((2, 1, 1, 2, 2), 0.9))


def test_half_weights_have_float32_states(llama, ids):
    lm = llama(2).bfloat16()
    optimizer = HiddenStateOptimizer(lm, lr=1e-6, chunk=CHUNK)
    before, after = (optimizer.adapt(ids, steps=n).states for n in (0, 1))
    assert before.dtype == after.dtype == torch.float32
    # Less than bfloat16 can tell apart.
    assert 0 < (after - before).abs().max() < 2e-6
    assert optimizer.score(ids).dtype == torch.float32


def test_the_model_is_left_as_it_was(llama, ids):
    lm = llama(1).train()
    before = {name: each.clone() for name, each in lm.state_dict().items()}
    HiddenStateOptimizer(lm, chunk=CHUNK).score(ids)
    assert lm.training
    assert all(each.requires_grad and each.grad is None for each in lm.parameters())
    assert all(torch.equal(each, before[name]) for name, each in lm.state_dict().items())


# ---- prompts


def test_no_step_is_the_prompt_as_it_is(lm, ids):
    optimizer = HiddenStateOptimizer(lm, lr=0.0, chunk=CHUNK)
    states = optimizer.adapt(ids[:12], steps=0)
    torch.testing.assert_close(optimizer.score(ids[12:], states), plain(lm, ids)[12:])
    # The pass over the cache that a step takes has the same logits, too.
    inputs = ids[None, :11]
    logits, _ = read(lm, states.states, inputs, 0, again=True)
    torch.testing.assert_close(logits, lm(input_ids=inputs).logits)


def test_what_labels_reach(lm, ids):
    """Only states before the last label's input have a gradient: it reads those before it."""
    mask = torch.zeros(12, dtype=torch.bool)
    mask[[3, 8]] = True
    optimizer = HiddenStateOptimizer(lm, lr=0.05)
    before, after = (optimizer.adapt(ids[:12], mask, steps=n) for n in (0, 3))
    moved = (after.states != before.states).any(-1).any(2).all(0)[0]
    assert moved.tolist() == [place < 7 for place in range(11)]
    labels = torch.tensor([8])

    def nll(states):
        logits, _ = read(lm, states.states, ids[None, :11], 0, again=True)
        return cross_entropy(logits[0, labels - 1], ids[labels])

    assert nll(after) < nll(before) - 0.01


def test_the_gradient_of_a_prompt_is_that_of_finite_differences(gpt2, ids):
    states = HiddenStateOptimizer(gpt2).adapt(ids[:5], steps=0).states

    def loss(x):
        logits, _ = read(gpt2, x, ids[None, :4], 0, again=True)
        return cross_entropy(logits[0], ids[1:5])

    assert torch.autograd.gradcheck(loss, states.requires_grad_(), fast_mode=True)


def test_candidates_are_scored_with_what_was_learned(lm, ids):
    """A repeated demonstration becomes likelier; the states that were given stay."""
    optimizer = HiddenStateOptimizer(lm, lr=0.05)
    prompt = ids[:12]
    before, after = (optimizer.adapt(prompt, steps=n) for n in (0, 10))
    kept = after.states.clone()
    assert optimizer.score(prompt[:4], after).shape == (4,)
    assert torch.equal(after.states, kept)
    assert (optimizer.score(ids[12:], after) != optimizer.score(ids[12:], before)).all()


# ---- bad input


@pytest.mark.parametrize(
    "options",
    [dict(chunk=0), dict(memory=0), dict(lr=-1.0), dict(betas=(0.9, 1.0)), dict(clip=0.0)],
)
def test_bad_options(lm, options):
    with pytest.raises(ValueError, match="expected (chunk|lr)") as raised:
        HiddenStateOptimizer(lm, **options)
    assert "\n" not in str(raised.value)


def test_caches_without_a_gradient(lm, ids):
    optimizer = HiddenStateOptimizer(lm, chunk=CHUNK)
    with torch.inference_mode():
        for call in (optimizer.score, optimizer.adapt):
            with pytest.raises(ValueError, match="no gradient reaches a cache"):
                call(ids)
        made = CachedStates.of(read(lm, None, ids[None, :-1], 0)[1], ids[-1:])
    with pytest.raises(ValueError, match="have no gradient"):
        optimizer.score(ids, made)
    with torch.no_grad():  # is no obstacle
        assert optimizer.score(ids).isfinite().all()


def test_bad_tokens_and_states(lm, ids):
    optimizer = HiddenStateOptimizer(lm)
    with pytest.raises(ValueError, match="129 tokens to read, but the model has 128 positions"):
        optimizer.score(ids.repeat(7)[:130])
    assert optimizer.score(ids.repeat(7)[:129]).shape == (129,)
    with pytest.raises(ValueError, match=r"expected token ids \[T\] or \[B, T\]"):
        optimizer.score(ids[None, None])
    states = optimizer.adapt(ids)
    with pytest.raises(ValueError, match="states of 1 rows, ids of 2"):
        optimizer.score(ids.expand(2, -1), states)
    nothing = torch.zeros(LENGTH, dtype=torch.bool)
    nothing[0] = True
    with pytest.raises(ValueError, match="a label after the first token"):
        optimizer.adapt(ids, nothing)
    with pytest.raises(ValueError, match="steps >= 0"):
        optimizer.adapt(ids, steps=-1)
    with pytest.raises(ValueError, match="expected label_mask bool"):
        optimizer.adapt(ids, nothing.long())


def test_a_cache_of_another_kind(ids):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1)
    config = MistralConfig(vocab_size=259, num_hidden_layers=1, sliding_window=4, **sizes)
    with pytest.raises(ValueError, match="caches more than the keys and values of all tokens"):
        HiddenStateOptimizer(MistralForCausalLM(config)).score(ids)


def test_a_position_table(gpt2, ids):
    """GPT-2 has learned positions: the cache goes on at the right one."""
    found = HiddenStateOptimizer(gpt2, lr=0.0, chunk=CHUNK).score(ids)
    torch.testing.assert_close(found, plain(gpt2, ids))


def test_the_examples():
    assert doctest.testmod(cached_states).failed == 0
