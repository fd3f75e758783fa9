"""Every row of the catalog: it imports, documents itself, its example runs, its recipe exists."""

import doctest
import importlib
import inspect

import pytest

from stillhouse.methods.catalog import METHODS, find
from stillhouse.recipes import runner

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@each_method
def test_module_names_and_domain_exports(method):
    module = method.load()
    domain = importlib.import_module(module.__package__)
    for name in method.names:
        assert getattr(domain, name) is getattr(module, name)
        assert name in domain.__all__
    assert method.objective is None or method.objective in method.names


@each_method
def test_docstrings_have_what_the_command_prints(method):
    module = method.load()
    assert f"arXiv {method.arxiv}" in module.__doc__
    assert "Equation" in module.__doc__
    for name in method.names:
        doc = inspect.getdoc(getattr(module, name))
        assert "Defaults:" in doc, name
        assert "Example:" in doc, name
        assert "Raises" in doc, name


@each_method
def test_examples_run(method):
    """Where each public name is defined: the method's module may only hand it on."""
    module = method.load()
    defined_in = {inspect.getmodule(getattr(module, name)) for name in method.names}
    for each in {module, *defined_in}:
        assert doctest.testmod(each).failed == 0, each.__name__
    finder, known = doctest.DocTestFinder(), set()
    for each in defined_in:
        known |= {test.name for test in finder.find(each, each.__name__) if test.examples}
    for name in method.names:
        item = getattr(module, name)
        assert f"{item.__module__}.{item.__qualname__}" in known, name


@each_method
def test_recipe_has_run(method):
    recipe = method.load_recipe()
    assert list(inspect.signature(recipe.run).parameters) == ["report", "seeds", "budget"]
    assert recipe.__doc__


def test_show_lists_the_catalog(capsys):
    runner.show()
    printed = capsys.readouterr().out
    for method in METHODS.values():
        assert method.id in printed
        assert method.title in printed


def test_show_lists_a_domain(capsys):
    runner.show(domain="language")
    printed = capsys.readouterr().out
    assert "taid" in printed
    assert "dm-codec" not in printed
    runner.show(domain="speech")
    printed = capsys.readouterr().out
    assert "dm-codec" in printed
    assert "taid" not in printed
    expected = "no domain 'langage': expected one of language, speech, speculative, compression"
    with pytest.raises(ValueError, match=expected):
        runner.show(domain="langage")


@each_method
def test_show_prints_one_method(method, capsys):
    runner.show(method.id)
    printed = capsys.readouterr().out
    assert f"https://arxiv.org/abs/{method.arxiv}" in printed
    assert method.load().__doc__.splitlines()[0] in printed
    for name in method.names:
        assert f"{name}(" in printed
    assert printed.count(">>>") >= len(method.names)


def test_an_unknown_id_is_one_line():
    with pytest.raises(ValueError, match="no method 'tiad': expected one of taid") as raised:
        find("tiad")
    assert "\n" not in str(raised.value)
