"""One more key and value: its share of a softmax, its place, bad inputs."""

import pytest
import torch

from stillhouse.methods.language import attention_slot


def ids():
    return torch.randint(259, (3, 4), generator=torch.Generator().manual_seed(0))


def test_a_slot_of_0_dilutes_a_uniform_softmax_by_one_in_n_plus_1(llama):
    """Queries of 0 look at all evenly: the mean of the values over n + 1 instead of n."""
    lm = llama(layers=1)
    attention = lm.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight.zero_()
    seen = []
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        lm(input_ids=ids())
        with attention_slot.beside([attention], torch.zeros(3, 32)):
            lm(input_ids=ids())
    n = torch.arange(1, 4 + 1)[:, None]
    # The slot is the first of the rows inside, and left out behind.
    assert torch.allclose(seen[1][:, 1:], seen[0] * n / (n + 1), atol=1e-6)


def test_the_slot_has_no_position(llama):
    """The token after it is at position 0, and what is in the slot is not turned."""
    lm = llama(layers=1)
    attention = lm.model.layers[0].self_attn
    seen = []
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    with attention_slot.beside([attention], torch.ones(3, 32)):
        # Registered before ours: it sees what the model gave. The one after sees what we made.
        handle = attention.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_embeddings"]),
            with_kwargs=True,
        )
        lm(input_ids=ids())
        handle.remove()
    (cos, sin), (wider_cos, wider_sin) = seen
    assert torch.equal(wider_cos[:, 1:], cos)
    assert torch.equal(wider_sin[:, 1:], sin)
    assert (wider_cos[:, 0] == 1).all()
    assert (wider_sin[:, 0] == 0).all()


def test_blocks_without_an_attention():
    class Block(torch.nn.Linear):
        pass

    block = Block(1, 1)
    with pytest.raises(ValueError, match="Block has 0 attentions: expected one"):
        attention_slot.attention_of(block)


def test_masks_that_are_not_understood():
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        attention_slot._wider(torch.ones(2, 4))
