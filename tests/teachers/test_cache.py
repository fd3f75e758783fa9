"""Tensors on disk under what they were made from."""

import multiprocessing

import pytest
import torch

from stillhouse.teachers import TensorCache, fingerprints


@pytest.fixture
def cache(tmp_path):
    return TensorCache(tmp_path / "cache")


def test_made_once(cache):
    calls = []

    def make():
        calls.append(1)
        return {"x": torch.arange(4).view(2, 2).T, "y": torch.tensor(2.5, dtype=torch.bfloat16)}

    key = {"inputs": torch.arange(3), "layer": 4, "options": [1.5, None, {"a": True}]}
    first, second = cache.get(key, make), cache.get(dict(reversed(key.items())), make)
    assert len(calls) == 1
    for name, want in make().items():
        assert torch.equal(first[name], want)
        assert torch.equal(second[name], want)
        assert second[name].dtype == want.dtype


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([1, 2], dtype=torch.int32)},
        {"a": torch.tensor([[1, 2]])},
        {"a": [1, 2]},
        {"a": [1, 2.0]},
        {"a": [True, 2]},
        {"a": ["1", 2]},
        {"a": {"dict": [1, 2]}},
        {"b": torch.tensor([1, 2])},
    ],
)
def test_keys_that_differ_are_not_mixed_up(cache, other):
    keys = [{"a": torch.tensor([1, 2])}, {"a": (1, 3)}]
    assert len({cache.path(key) for key in [*keys, other]}) == 3


def test_a_damaged_file_is_made_again(cache):
    key, calls = {"a": 1}, []

    def make():
        calls.append(1)
        return {"x": torch.zeros(100)}

    cache.get(key, make)
    path = cache.path(key)
    data = path.read_bytes()
    for number, damaged in enumerate((data[:-1], data[:-1] + b"\x01", data[:20], b""), 2):
        path.write_bytes(damaged)
        assert torch.equal(cache.get(key, make)["x"], torch.zeros(100))
        assert len(calls) == number
        cache.get(key, make)
        assert len(calls) == number


def test_another_keys_file_is_not_taken(cache):
    cache.get({"a": 1}, lambda: {"x": torch.zeros(1)})
    other = cache.path({"a": 2})
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_bytes(cache.path({"a": 1}).read_bytes())
    assert cache.get({"a": 2}, lambda: {"x": torch.ones(1)})["x"].item() == 1


def test_nothing_is_left_of_a_result_that_cannot_be_stored(cache):
    with pytest.raises(TypeError, match="tensors by name, got list"):
        cache.get({"a": 1}, lambda: {"x": [1]})
    with pytest.raises(ZeroDivisionError):
        cache.get({"a": 1}, lambda: {"x": torch.ones(1) / (1 // 0)})
    assert not list(cache.root.rglob("*.*"))
    with pytest.raises(TypeError, match=r"key.model is Linear"):
        cache.get({"model": torch.nn.Linear(1, 1)}, dict)


def _get(root, queue):
    got = TensorCache(root).get({"a": 1}, lambda: {"x": torch.full((1000,), 3.0)})
    queue.put(bool((got["x"] == 3).all()))


def test_processes_share_it(cache):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_get, args=(cache.root, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert all(queue.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    assert [path.suffix for path in cache.root.rglob("*.*")] == [".safetensors"]


def test_fingerprints_of_models():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    first = fingerprints.of_model(model)
    assert fingerprints.of_model(model.eval()) == first
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    assert fingerprints.of_model(model) != first
    assert fingerprints.of_model(torch.nn.Linear(3, 2).bfloat16()) != first
