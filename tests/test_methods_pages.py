"""docs/methods/: up to date with the docstrings, equations and examples as blocks."""

import importlib.util
import inspect
import sys
from pathlib import Path

import pytest

from stillhouse.methods.catalog import METHODS

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("pages", ROOT / "tools" / "methods_pages.py")
pages = sys.modules["pages"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)

DOC = """Equation, q the student:

    L = a + b

    dL/dq = 1
    (of it)

Words.

Example:
    >>> 1 + 1
    2
"""
MARKDOWN = """Equation, q the student:

```text
L = a + b

dL/dq = 1
(of it)
```

Words.

Example:

```python
>>> 1 + 1
2
```"""


def test_a_docstring_as_markdown():
    assert pages.markdown(DOC) == MARKDOWN


def test_long_signatures_keep_their_star():
    def long(first: int, *, second_argument_of_many: int = 1, third_argument_of_many: str = "x"):
        """Words."""

    lines = pages.entry("a_name_of_some_length_for_a_function", long).splitlines()
    assert lines[2:8] == [
        "```python",
        "a_name_of_some_length_for_a_function(",
        "    first: int,",
        "    *,",
        "    second_argument_of_many: int = 1,",
        "    third_argument_of_many: str = 'x',",
    ]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_page_has_all_of_a_method(method):
    section = pages.section(method)
    for name in method.names:
        assert f"### `{name}`" in section
        first = inspect.getdoc(getattr(method.load(), name)).splitlines()[0]
        assert first in section
    assert "```text" in section
    assert section.count("```python") >= 2 * len(method.names)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="other Pythons write signatures anew")
@pytest.mark.parametrize("domain", pages.domains())
def test_the_pages_are_up_to_date(domain):
    written = (pages.PAGES / f"{domain}.md").read_text(encoding="utf-8")
    assert written == pages.page(domain), "run make docs"
