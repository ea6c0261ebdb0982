"""Each recipe of nested_jax/meta/recipes.md runs by itself and prints what it says."""

import doctest
from pathlib import Path

import pytest

import nested_jax.meta

PAGE = (Path(nested_jax.meta.__file__).parent / "recipes.md").read_text()
RECIPES = dict(section.split("\n", 1) for section in PAGE.split("\n## ")[1:])


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    test = doctest.DocTestParser().get_doctest(RECIPES[name], {}, name, "recipes.md", None)
    assert test.examples
    report = []
    doctest.DocTestRunner().run(test, out=report.append)
    assert not report, "".join(report)
