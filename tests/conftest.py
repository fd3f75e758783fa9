"""Shared by every test: no network, a fixed seed, the CUDA kernels on the CPU's executor; a tiny
language model and its tokenizer."""

import os
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from stillhouse.ops import (
    divergence_autograd,
    fdb_autograd,
    linear_divergence_autograd,
    rvq_autograd,
    sinkhorn_autograd,
    tree_registered,
)

# SIMT_LIBRARY names another build, such as the one with sanitizers.
SIMT = Path(os.environ.get("SIMT_LIBRARY", Path(__file__).parents[1] / "build/simt/_simt.so"))


VOCABULARY = 259  # 256 bytes and three special tokens
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def pytest_addoption(parser):
    words = "cuda: the ops, the losses of methods and the trainer on a GPU, too"
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help=words)


def pytest_collection_modifyitems(config, items):
    # To the CUDA kernels "resident" is what they choose anyway.
    left_out = ["levelsimt-resident", "levelcuda-resident"]
    if config.getoption("--device") != "cuda":
        left_out += ["levelcuda", "kernels-cuda", "device-cuda"]
    deselected = [item for item in items if any(word in item.nodeid for word in left_out)]
    config.hook.pytest_deselected(items=deselected)
    chosen = set(items) - set(deselected)
    items[:] = [item for item in items if item in chosen]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["cuda"], ids=lambda name: f"device-{name}")
def gpu(request):
    """The device of tests that compare a GPU with the CPU; left out without --device cuda."""
    return torch.device(request.param)


@cache
def _simt_ops():
    torch.ops.load_library(str(SIMT))
    for family in (
        divergence_autograd,
        fdb_autograd,
        linear_divergence_autograd,
        rvq_autograd,
        sinkhorn_autograd,
        tree_registered,
    ):
        family.register("stillhouse_simt")
    return torch.ops.stillhouse_simt


@pytest.fixture
def simt(monkeypatch):
    """Puts the CUDA kernels, run by the executor of tests/simt, in the place of the CPU's."""
    if not SIMT.exists():
        pytest.skip("the executor of tests/simt is not built (make test builds it)")
    monkeypatch.setattr(divergence_autograd, "_kernels", _simt_ops())


@pytest.fixture(scope="session")
def sizes():
    """What the configurations of all these models share."""
    return dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


@pytest.fixture(scope="session")
def llama(sizes):
    """llama(layers, vocab_size=259, seed=0): a random Llama of width 32, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(layers=2, vocab_size=VOCABULARY, seed=0, **options):
        torch.manual_seed(seed)
        config = LlamaConfig(
            **(sizes | {"vocab_size": vocab_size}),
            num_hidden_layers=layers,
            max_position_embeddings=128,
            eos_token_id=258,
            bos_token_id=None,
            **options,
        )
        # Weights of the usual size give nearly uniform rows at width 32: nothing could differ.
        config.initializer_range = 0.3
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def make_tokenizer():
    """make_tokenizer(): a byte-level tokenizer with a chat template, made without any file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make():
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens(["<|start|>", "<|pad|>", "<|end|>"])
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            eos_token="<|end|>",
            pad_token="<|pad|>",
            chat_template=TEMPLATE,
        )

    return make


@pytest.fixture
def tokenizer(make_tokenizer):
    """One that a test may change."""
    return make_tokenizer()
