"""Fixtures for the tests of experiments: modules by name; committed results stay as they are."""

import json
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import scripts
from matplotlib.image import imread


def pytest_collection_modifyitems(items):
    """Marks every test of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.experiments)


def committed():
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in scripts.EXPERIMENTS.glob("*/results/*")}


@pytest.fixture
def load(request):
    """`scripts.load`, by default from FOLDER of the test's module."""
    before = committed()
    yield lambda name, folder=request.module.FOLDER: scripts.load(name, folder)
    assert committed() == before


@pytest.fixture
def written(load, tmp_path):
    """Measures a config and writes the results into a temporary folder; returns those of the JSON, and the table."""

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
    """The results of the first seed."""
    if isinstance(rows, dict):
        return {key: first(value) for key, value in rows.items()}
    return rows[:1] if isinstance(rows, list) else rows
