"""Reading trees behind sequences of different lengths, against forwards without any cache."""

import pytest
import torch
from transformers import DynamicCache

from stillhouse.methods.speculative.cached_model import CachedModel
from stillhouse.methods.speculative.kv_cache import TreeCache

PROMPTS = [[1, 2, 3, 4, 5, 6], [7], [9, 8, 7]]
# Two trees of six nodes and their ancestors, the nodes themselves included.
TOKENS = [[6, 11, 12, 13, 14, 15], [7, 21, 22, 23, 24, 25], [7, 31, 32, 33, 34, 35]]
PATHS = [[[0], [0, 1], [0, 2], [0, 2, 3], [0, 2, 3, 4], [0, 1, 5]]] * 3


def visible(paths):
    seen = torch.zeros(len(paths), 6, 6, dtype=torch.bool)
    for row, each in enumerate(paths):
        for node, path in enumerate(each):
            seen[row, node, path] = True
    return seen


def positions(model, paths):
    depth = torch.tensor([[len(path) - 1 for path in each] for each in paths])
    return torch.tensor(model.cache.lengths)[:, None] + depth


def plain(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


@pytest.fixture
def model(llama):
    return llama(vocab_size=40)


@torch.inference_mode()
def test_each_node_sees_its_ancestors_alone_and_paths_are_kept(model):
    reading = CachedModel(model, needs_features=True)
    reading.read([torch.tensor(each) for each in PROMPTS], room=2)
    sequences = [list(each[:-1]) for each in PROMPTS]
    accepted = [[0, 2, 3], [0], [0, 1, 5]]
    for _ in range(3):  # the third one outgrows the room
        at = positions(reading, PATHS)
        logits = reading.forward(torch.tensor(TOKENS), at, visible(PATHS))
        for row, paths in enumerate(PATHS):
            for node, path in enumerate(paths):
                ids = sequences[row] + [TOKENS[row][each] for each in path]
                torch.testing.assert_close(logits[row, node], plain(model, ids))
        torch.testing.assert_close(model.lm_head(reading.features), logits)
        reading.cache.accept(accepted)
        for row, path in enumerate(accepted):
            sequences[row] += [TOKENS[row][node] for node in path]
        assert reading.cache.lengths == list(map(len, sequences))
    reading.cache.keep([2, 0])
    ids = torch.tensor([[5, 4], [3, 2]])
    at = torch.tensor(reading.cache.lengths)[:, None] + torch.arange(2)
    logits = reading.forward(ids, at)
    for row, number in enumerate((2, 0)):
        for count in (1, 2):
            alone = plain(model, sequences[number] + ids[row, :count].tolist())
            torch.testing.assert_close(logits[row, count - 1], alone)


@torch.inference_mode()
def test_features_of_prompts(model):
    reading = CachedModel(model, needs_features=True)
    features = reading.read([torch.tensor(each) for each in PROMPTS], room=2)
    for each, prompt in zip(features, PROMPTS, strict=True):
        hidden = model.model(torch.tensor([prompt])).last_hidden_state[0, :-1]
        torch.testing.assert_close(each, hidden)


@torch.inference_mode()
def test_memory_stays_where_it_is(model):
    reading = CachedModel(model)
    reading.read([torch.tensor(PROMPTS[0])], room=20)
    before = [layer.keys.data_ptr() for layer in reading.cache.layers]
    for _ in range(3):
        at = torch.tensor([[reading.cache.lengths[0]]])
        reading.forward(torch.tensor([[3]]), at)
        reading.cache.accept([[0]])
    assert [layer.keys.data_ptr() for layer in reading.cache.layers] == before


def test_other_layers_are_refused(model):
    cache = DynamicCache(config=model.config)
    cache.layers[0].__class__ = type("WindowLayer", (type(cache.layers[0]),), {})
    with pytest.raises(ValueError, match="full attention in every layer, got a WindowLayer"):
        TreeCache(cache, [3], 5)
