"""Docstrings of public names: arguments, returns, source and an example, which the doctests run."""

import importlib
import inspect
import re

import pytest

PAPERS = ("nested_jax.optim", "nested_jax.meta", "nested_jax.paths", "nested_jax.memory", "nested_jax.cms")
PACKAGES = (*PAPERS, "nested_jax", "nested_jax.data", "nested_jax.data.tasks")


def public_names():
    """(package, name) of what a package exports: `__all__`, or the functions that a module defines. No exceptions."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        own = (n for n, x in vars(module).items() if inspect.isfunction(x) and x.__module__ == package)
        for name in getattr(module, "__all__", None) or [name for name in own if not name.startswith("_")]:
            thing = getattr(module, name)
            if callable(thing) and not (inspect.isclass(thing) and issubclass(thing, Exception)):
                yield package, name


@pytest.mark.parametrize(("package", "name"), public_names())
def test_public_name_is_documented(package, name):
    """Functions have Args, Returns (if they return anything), an example and, where a paper has them, Source.

    Classes say what each field is, in their docstring or under the field. They have an example, but for tuples, which the
    functions that return them show, and for what has to be subclassed.
    """
    thing = getattr(importlib.import_module(package), name)
    docstring, needed = inspect.getdoc(thing) or "", {}
    parameters = [name for name in inspect.signature(thing).parameters if name not in ("args", "kwargs")]
    if not inspect.isclass(thing):
        needed["an example"] = ">>> "
        if parameters:
            needed["Args"] = "\nArgs:\n"
        if inspect.signature(thing).return_annotation != "None":
            needed["Returns"] = "\nReturns:\n"
            needed |= {"Source": "\nSource: "} if package in PAPERS else {}
    elif not (issubclass(thing, tuple) or inspect.isabstract(thing) or getattr(thing, "_is_protocol", False)):
        needed["an example"] = ">>> "
    missing = [section for section, text in needed.items() if text not in docstring]
    assert not missing, f"{package}.{name} lacks {', '.join(missing)}"
    fields = set(re.findall(r'^    (\w+): .*\n    """', inspect.getsource(thing), re.M)) if inspect.isclass(thing) else set()
    undocumented = [p for p in parameters if p not in docstring.split("Args:")[-1] and p not in fields]
    assert not undocumented, f"Args of {package}.{name} lack {', '.join(undocumented)}"
