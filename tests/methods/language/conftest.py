"""Shared by the language methods' tests: small models."""

import pytest
import torch


@pytest.fixture
def make_student():
    """make_student(which, **options): "ours", or a random T5 or BART."""

    def make(which="ours", vocab_size=40):
        torch.manual_seed(3)
        if which == "ours":
            from stillhouse.methods.language import EncoderDecoder, EncoderDecoderConfig

            sizes = dict(width=16, heads=4, kv_heads=2, head_size=4, ffn=32, dropout=0.0)
            layers = dict(encoder_layers=2, decoder_layers=1)
            return EncoderDecoder(EncoderDecoderConfig(vocab_size, **layers, **sizes), seed=3)
        from transformers import (
            BartConfig,
            BartForConditionalGeneration,
            T5Config,
            T5ForConditionalGeneration,
        )

        if which == "t5":
            config = T5Config(
                vocab_size=vocab_size,
                d_model=16,
                d_kv=4,
                d_ff=32,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
            )
            config.decoder_start_token_id, config.eos_token_id = 0, 2
            return T5ForConditionalGeneration(config)
        each = {"layers": 1, "ffn_dim": 32, "attention_heads": 2}
        sizes = {f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in each.items()}
        config = BartConfig(
            vocab_size=vocab_size, d_model=16, max_position_embeddings=24, dropout=0.0, **sizes
        )
        config.decoder_start_token_id, config.forced_eos_token_id = 2, None
        return BartForConditionalGeneration(config)

    return make


@pytest.fixture
def make_teacher():
    """make_teacher(which): a random Llama (RoPE) or GPT-2 (learned positions)."""

    def make(which="llama", vocab_size=40):
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

        torch.manual_seed(4)
        if which == "llama":
            config = LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_range=0.3,
            )
            return LlamaForCausalLM(config).eval()
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=24,
            n_embd=16,
            n_layer=2,
            n_head=2,
            initializer_range=0.3,
        )
        return GPT2LMHeadModel(config).eval()

    return make


@pytest.fixture(scope="session")
def bert():
    """bert(seed=0, **options): a random masked language model of 23 tokens, width 16 and two
    blocks, in evaluation mode."""
    from transformers import BertConfig, BertForMaskedLM

    def make(seed=0, **options):
        torch.manual_seed(seed)
        sizes = dict(
            vocab_size=23,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=12,
            # Of the usual size the weights say next to nothing at this width.
            initializer_range=0.3,
        )
        return BertForMaskedLM(BertConfig(**(sizes | options))).eval()

    return make
