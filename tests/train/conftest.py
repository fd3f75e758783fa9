"""Batches, examples and arguments for quick training runs."""

import pytest
import torch


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
