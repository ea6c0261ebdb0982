"""An experiment's modules, for one test, in which results that are kept stay as they are."""

import importlib
import json
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.image import imread

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def kept():
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in EXPERIMENTS.glob("*/results/*")}


@pytest.fixture
def load(request, monkeypatch):
    """Imports modules, which have plain names for one another, from FOLDER of the test's module or another folder."""
    before = kept()

    def load(name, folder=request.module.FOLDER):
        monkeypatch.syspath_prepend(str(EXPERIMENTS))
        monkeypatch.syspath_prepend(str(EXPERIMENTS / folder))
        return importlib.import_module(name)

    yield load
    for path in EXPERIMENTS.rglob("*.py"):
        sys.modules.pop(path.stem, None)
    assert kept() == before


@pytest.fixture
def written(load, tmp_path):
    """Measures a config and writes it into a folder of the test's; gives what its JSON has, and its table."""

    def written(module, config):
        path = tmp_path / "experiments" / "results" / "small"
        path.parent.parent.mkdir()
        load("record").in_one_go(path, config, module.measure, module.table, module.figure)
        assert imread(f"{path}.png").std() > 0.01
        refuse = lambda word: pytest.fail(f"JSON with {word}")
        results = json.loads(Path(f"{path}.json").read_text(), parse_constant=refuse)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            one = results | {"rows": [first(row) for row in results["rows"]], "config": results["config"] | {"seeds": [0]}}
            one["transfer"] = first(results.get("transfer", {}))
            assert "nan" not in module.table(one)
            plt.close(module.figure(one))
        return results, Path(f"{path}.md").read_text()

    return written


def first(rows):
    """Of results, what is of the first seed."""
    if isinstance(rows, dict):
        return {key: first(value) for key, value in rows.items()}
    return rows[:1] if isinstance(rows, list) else rows
