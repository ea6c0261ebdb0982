"""The notebooks' first cells: the badge, and what is installed where nested_jax is missing."""

import builtins
import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jupytext
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.py"))
CUDA = {"jax-cuda12-plugin": "0.10.2", "jax_cuda12_pjrt": "0.10.2"}


def first_code(path):
    return next(cell.source for cell in jupytext.read(path).cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_badge_opens_this_notebook_and_the_first_code_cell_is_the_same_in_all(path):
    badge = jupytext.read(path).cells[0].source
    assert f"(https://colab.research.google.com/github/nested-jax/nested_jax/blob/main/colab/{path.stem}.ipynb)" in badge
    assert first_code(path) == first_code(path.with_suffix(".ipynb")) == first_code(NOTEBOOKS[0])


@pytest.fixture
def first_cell(monkeypatch):
    """Runs the cell where these distributions are installed, nested_jax is not and jax is imported or not; returns what
    pip is given."""

    def run(installed, imported):
        commands = []
        jax = SimpleNamespace(devices=lambda: [SimpleNamespace(platform="gpu", device_kind="Tesla T4")])
        found = [SimpleNamespace(name=name, version=version) for name, version in installed.items()]
        found.append(SimpleNamespace(name=None, version=None))  # a damaged folder
        load = lambda name, *where: jax if name == "jax" else __import__(name, *where)
        source, lines = re.subn(r"^( *)%pip (.*)$", r"\1pip(f'''\2''')", first_code(NOTEBOOKS[0]), flags=re.MULTILINE)
        assert lines == 1
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "distributions", lambda: found)
            patch.setattr(importlib.util, "find_spec", lambda name: None)
            patch.setattr(
                sys, "modules", {name: module for name, module in sys.modules.items() if name != "jax" or imported}
            )
            exec(source, {"pip": commands.append, "__builtins__": vars(builtins) | {"__import__": load}})
        return commands

    return run


@pytest.mark.parametrize(
    ("installed", "imported", "needed"),
    [
        ({}, False, "jax>=0.10.2"),
        ({"jax": "0.10.2"}, True, "jax==0.10.2"),
        ({"jax": "0.4.33"}, False, "jax>=0.10.2"),
        ({"jax": "0.11.0", **CUDA}, True, "jax==0.11.0"),
        ({"jax": "0.10.1", **CUDA}, False, "jax[cuda12]>=0.10.2"),
        ({"jax": "0.10.2rc1", "jax_cuda13_plugin": "0.10.2rc1"}, False, "jax[cuda13]>=0.10.2"),
        ({"jax": "0.9.0", "libtpu": "0.0.30"}, False, "jax[tpu]>=0.10.2"),
        ({"jax": "0.12.0", "libtpu": "0.0.50"}, False, "jax==0.12.0"),
    ],
)
def test_a_new_jax_stays_and_an_old_one_is_upgraded_with_its_plugin(first_cell, capsys, installed, imported, needed):
    (command,) = first_cell(installed, imported)
    assert Requirement(re.search('"(.*)"', command)[1]) == Requirement(needed)
    assert command.endswith(" git+https://github.com/nested-jax/nested_jax")
    said = capsys.readouterr().out
    assert said.startswith("gpu device Tesla T4: jax ") and said.count("\n") == 1
    assert f"nested_jax {importlib.metadata.version('nested_jax')}" in said


def test_an_old_jax_that_is_already_imported_asks_for_a_restart(first_cell, capsys):
    with pytest.raises(SystemExit, match="Runtime > Restart session, then run this cell again"):
        first_cell({"jax": "0.7.2", **CUDA}, True)
    assert not capsys.readouterr().out


def test_the_first_cell_asks_for_the_jax_that_the_package_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = (line for line in project["dependencies"] if Requirement(line).name == "jax")
    assert set(re.findall(r"\d+\.\d+\.\d+", first_code(NOTEBOOKS[0]))) == {needed.removeprefix("jax>=")}
