"""Shared by the tests of draft heads: a tiny target in float64."""

import pytest
import torch


@pytest.fixture
def target():
    """A Llama of two blocks, width 16, 11 tokens; its weights are large enough to have opinions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.4,
    )
    torch.manual_seed(3)
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)
