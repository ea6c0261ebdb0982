"""Docstrings of public names: arguments, returns, source and an example, which the doctests run."""

import importlib
import inspect

import pytest

PACKAGES = ("nested_jax.optim", "nested_jax.meta", "nested_jax.paths")


def public_names():
    """(package, name) of what a package exports: `__all__`, or the functions that a module defines."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        own = (n for n, x in vars(module).items() if inspect.isfunction(x) and x.__module__ == package)
        for name in getattr(module, "__all__", None) or [name for name in own if not name.startswith("_")]:
            if callable(getattr(module, name)):
                yield package, name


@pytest.mark.parametrize(("package", "name"), public_names())
def test_public_name_is_documented(package, name):
    """Functions have Args, Returns (if they return anything), Source and an example; classes have Args and an example."""
    thing = getattr(importlib.import_module(package), name)
    docstring = inspect.getdoc(thing) or ""
    needed = {"an example": ">>> "}
    if inspect.signature(thing).parameters:
        needed["Args"] = "\nArgs:\n"
    if not inspect.isclass(thing) and inspect.signature(thing).return_annotation != "None":
        needed |= {"Returns": "\nReturns:\n", "Source": "\nSource: "}
    missing = [section for section, text in needed.items() if text not in docstring]
    assert not missing, f"{package}.{name} lacks {', '.join(missing)}"
    undocumented = [p for p in inspect.signature(thing).parameters if p not in docstring.split("Args:")[-1]]
    assert not undocumented, f"Args of {package}.{name} lack {', '.join(undocumented)}"
