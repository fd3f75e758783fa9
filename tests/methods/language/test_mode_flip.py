"""The contamination that flips a mode, and entropies that are known."""

import doctest
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.methods.language import (
    making_the_most,
    mode_flip,
    mode_flip_threshold,
    output_entropy,
)
from stillhouse.train import sequence_logprobs


def test_the_threshold():
    assert mode_flip_threshold(100) == pytest.approx(7.888609052210118e-31, rel=1e-12)
    assert mode_flip_threshold(100) < 1e-9  # so that a share of 1e-9 flips the mode
    assert mode_flip_threshold(0) == 0.5
    assert mode_flip_threshold(2000) == 0
    for bits in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="a finite number of bits >= 0"):
            mode_flip_threshold(bits)


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_the_mode_flips_there(bits):
    """A mixture of 2^bits equally likely good texts and a bad one, in the last place."""
    good = torch.full((2**bits,), 0.5**bits, dtype=torch.float64)
    threshold = mode_flip_threshold(bits)
    for share, is_bad in ((threshold * 0.999, False), (threshold * 1.001, True)):
        mixture = torch.cat([(1 - share) * good, torch.tensor([share], dtype=torch.float64)])
        assert (int(mixture.argmax()) == 2**bits) == is_bad


@pytest.fixture
def coin():
    """A model whose every token has the same probabilities: 1/2, 1/8 and 1/8, and 1/4 for the
    end."""
    sizes = dict(hidden_size=4, intermediate_size=4, num_attention_heads=1, num_key_value_heads=1)
    config = LlamaConfig(vocab_size=4, num_hidden_layers=1, eos_token_id=3, **sizes)
    lm = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.zero_()
        # The same state of ones for all tokens.
        lm.model.embed_tokens.weight.fill_(1.0)
        lm.model.norm.weight.fill_(1.0)
        lm.lm_head.weight[:, 0] = torch.tensor([0.5, 0.125, 0.125, 0.25]).log()
    return lm


def test_the_entropy_of_a_geometric_length(coin):
    """1.75 bits a token and 4 tokens a response, its end included: 7 bits."""
    options = dict(samples=400, max_new_tokens=80, seed=0)
    found = output_entropy(coin, [[0], [1, 2]], **options)
    assert (found.bits - 7).abs().max() < 4 * found.stderr.max()
    assert 0.1 < found.stderr.max() < 0.5
    torch.testing.assert_close(found.empty, torch.full((2,), 0.25, dtype=torch.float64))
    # The likeliest response is the empty one, 2 bits: 400 draws have it.
    torch.testing.assert_close(found.best_bits, torch.full((2,), 2.0, dtype=torch.float64))
    want = [mode_flip_threshold(bits) for bits in found.bits.tolist()]
    assert found.threshold.tolist() == pytest.approx(want, rel=1e-12)


def test_responses_that_are_cut_have_the_entropy_of_what_is_left(coin):
    """Of one token: 1.75 bits."""
    found = output_entropy(coin, [[0]], samples=2000, max_new_tokens=1, seed=1)
    assert abs(found.bits[0] - 1.75) < 4 * found.stderr[0]


def test_several_ends_and_draws_that_are_seeded(coin):
    options = dict(samples=8, max_new_tokens=5)
    coin.generation_config.eos_token_id = [2, 3]
    found = output_entropy(coin, [[0]], seed=0, **options)
    torch.testing.assert_close(found.empty, torch.tensor([0.375], dtype=torch.float64))
    again, other = (output_entropy(coin, [[0]], seed=seed, **options).bits for seed in (0, 1))
    assert torch.equal(found.bits, again)
    assert not torch.equal(found.bits, other)


def test_the_probability_of_empty_is_the_models(llama):
    lm = llama(1).double()
    found = output_entropy(lm, [[5, 9], [7]], samples=2, max_new_tokens=3, seed=0).empty
    for prompt, value in zip([[5, 9], [7]], found, strict=True):
        ids = torch.tensor([[*prompt, 258]])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch["labels"] = ids.clone().index_fill(1, torch.arange(len(prompt)), -100)
        torch.testing.assert_close(value, sequence_logprobs(lm, batch)[0].exp())


def test_bad_input(coin):
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        output_entropy(coin, [[0]], samples=1, max_new_tokens=3, seed=0)
    coin.generation_config.eos_token_id = coin.config.eos_token_id = None
    with pytest.raises(ValueError, match="no end token"):
        output_entropy(coin, [[0]], samples=2, max_new_tokens=3, seed=0)


def test_the_examples():
    for module in (mode_flip, making_the_most):
        assert doctest.testmod(module).failed == 0
