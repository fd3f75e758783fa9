"""Models and a tokenizer small enough to be made for each test."""

import pytest
import torch

VOCABULARY = 259  # 256 bytes and three special tokens
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture
def sizes():
    """What the configurations of all these models share."""
    return dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


@pytest.fixture
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


@pytest.fixture
def tokenizer():
    """A byte-level tokenizer with a chat template, made without any file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

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


@pytest.fixture
def batch():
    """Two sequences of unlike length, padded, the first one with a masked prompt."""
    from stillhouse.train.examples import Example, collate

    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (2, 12), generator=generator, dtype=torch.int32).numpy()
    mask = [[False] * 4 + [True] * 8, [True] * 9]
    return collate(
        [
            Example(ids[0], torch.tensor(mask[0]).numpy(), 7),
            Example(ids[1][:9], torch.tensor(mask[1]).numpy(), 11),
        ],
        padding=257,
    )


@pytest.fixture
def examples():
    """A set of 24 packed examples of 16 tokens, with unlike numbers of targets."""
    from stillhouse.train.examples import Example, ExampleSet

    generator = torch.Generator().manual_seed(4)
    result = []
    for record in range(24):
        length = 6 + record % 11
        ids = torch.randint(0, 256, (length,), generator=generator, dtype=torch.int32)
        mask = torch.arange(length) >= record % 4
        result.append(Example(ids.numpy(), mask.numpy(), record))
    return ExampleSet(result)


@pytest.fixture
def arguments(tmp_path):
    """arguments(**changes): training arguments of a quick run on the CPU."""
    from transformers import TrainingArguments

    def make(**changes):
        options = dict(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            seed=0,
        )
        return TrainingArguments(**(options | changes))

    return make
