"""Results are not lost; invalid flags are refused in one line, before anything is computed."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

FOLDER = "meta_learning"


@dataclass(frozen=True)
class Flags:
    steps: int = 3
    fresh: bool = False


@pytest.fixture
def path(tmp_path):
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder" / "results" / "small"


def measured(value):
    return lambda config: {"rows": [config.steps * value]}


def go(record, path, config, measure):
    record.in_one_go(path, config, measure, lambda results: f"{results['rows']}\n", lambda _: plt.figure())
    return json.loads((path.parent / "small.json").read_text())


def test_results_of_other_flags_are_kept(load, monkeypatch, path):
    """Only the same command or --fresh replaces them, and only when it ends."""
    record, flags = load("record"), load("flags")
    monkeypatch.setattr(sys, "argv", ["small.py", "--steps", "3"])
    first = go(record, path, Flags(), measured(1.5))
    assert first["rows"] == [4.5] and first["config"] == {"steps": 3} and first["seconds"] == 0
    assert first["command"] == "python experiments/folder/small.py --steps 3"
    files = {name: (path.parent / name).read_bytes() for name in ("small.json", "small.md", "small.png")}
    never = lambda _: pytest.fail("measured")
    with pytest.raises(flags.UserError, match=r"small.json was made with other flags: give those, or --fresh to replace it"):
        go(record, path, Flags(4), never)
    stop = lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
    for config in (Flags(), Flags(4, fresh=True)):
        with pytest.raises(KeyboardInterrupt):
            go(record, path, config, stop)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == files
    assert go(record, path, Flags(), measured(2.0))["rows"] == [6]
    assert go(record, path, Flags(4, fresh=True), measured(2.0))["rows"] == [8]
    for text in ("no JSON", "[1]"):
        (path.parent / "small.json").write_text(text)
        with pytest.raises(flags.UserError, match="small.json cannot be read as results: move it, or give --fresh"):
            go(record, path, Flags(), never)


GRIDS = (
    *("ablation/run", "chunks/boundary", "chunks/run", "chunks/starts", "continual/run", "fidelity/run", "pods/run"),
    *("formal_languages/run", "recall/run", "streams/run", "benchmarks/tpu_static"),
    "formal_languages/run --into longer --tasks s3 anbn --steps 3200 --rates 0.003",
    "recall/run --into mad --longest 64 --steps 800 --batch-size 16",
    "recall/run --into passkey --steps 800 --batch-size 16",
)


@pytest.mark.parametrize("command", GRIDS)
def test_a_committed_table_is_made_of_its_json(load, monkeypatch, tmp_path, command):
    """With --report, as the READMEs say."""
    script, *flags = command.split()
    folder, name = script.split("/")
    module, into = load(name, folder), flags[1] if flags else {"run": folder}.get(name, name)
    (tmp_path / "results").mkdir()
    shutil.copy(module.RESULTS / f"{into}.json", tmp_path / "results")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--report", *flags])
    plt.close("all")
    module.main()
    plt.close("all")
    for suffix in ("json", "md"):
        committed = Path(module.__file__).parent / "results" / f"{into}.{suffix}"
        assert (tmp_path / "results" / f"{into}.{suffix}").read_text() == committed.read_text()


def test_an_impossible_folder_is_refused_first(load, path):
    record, flags = load("record"), load("flags")
    path.parent.write_text("a file")
    with pytest.raises(flags.UserError, match="results is no folder for results, File exists: make it one"):
        go(record, path, Flags(), lambda _: pytest.fail("measured"))


def test_numbers_that_are_not_finite_are_null(load, monkeypatch, path):
    record = load("record")
    found = go(record, path, Flags(), lambda _: {"rows": [1.0, float("nan"), {"inf": (-float("inf"), "nan")}]})
    assert found["rows"] == [1.0, None, {"inf": [None, "nan"]}]
    np.testing.assert_array_equal(np.array(found["rows"][:2], float), [1, np.nan])


def test_curves_have_their_spread(load):
    """One standard deviation around the mean; geometric: of the logarithms; of one curve: none."""
    record = load("record")
    _, ax = plt.subplots()
    for curves, geometric, wanted in (
        ([[1.0, 2], [3, 4]], False, [2 - 2**0.5, 2 + 2**0.5, 3 - 2**0.5, 3 + 2**0.5]),
        ([[1.0, 4], [4, 4]], True, [2 ** (1 - 2**0.5), 2 ** (1 + 2**0.5), 4, 4]),
        ([[1.0, 2]], False, [1, 1, 2, 2]),
    ):
        record.band(ax, [0, 1], np.array(curves), geometric=geometric)
        corners = ax.collections[-1].get_paths()[0].vertices
        found = [end(corners[corners[:, 0] == x, 1]) for x in (0, 1) for end in (min, max)]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("rates", "--conditions foo", "--conditions 'foo': give one of 16 and 256,"),
        ("rates", "--clip nan", "--clip nan: give a finite number of at least 0"),
        ("rates", "--clip -1", "--clip -1.0: give a finite number of at least 0"),
        ("rates", "--periods 64 16 5", "model.cms.periods: 16 is not a multiple of 5: give periods"),
        ("rates", "--tokens 70", "--tokens 70: give a multiple of the slowest period, 64"),
        ("rates", "--steps -1", "--steps -1: give a whole number of at least 1"),
        ("rates", "--steps 0", "--steps 0: give a whole number of at least 1"),
        ("rates", "--grid 1 nan", "--grid (1.0, nan): give a tuple, each a finite number above 0"),
        ("rates", "--grid 2 1", "--grid 2.0 1.0: give numbers that rise"),
        ("rates", "--seeds 1 1", "--seeds 1 1: give one or more, each once"),
        ("initial_memory", "--memories foo", "--memories 'foo': give one of linear, deep"),
        ("initial_memory", "--hidden 8", "--hidden 8: give at least twice --width 8"),
        ("initial_memory", "--pairs 9", "--pairs 9: give a multiple of --chunk 8"),
        ("initial_memory", "--shared 1.5", "--shared 1.5: give a finite number of at least 0 and at most 1"),
        ("deep_momentum", "--geometries -1", "--geometries (-1,): give a tuple, each a whole number of at least 0"),
        ("deep_momentum", "--long 10", "--long 10: give at least --steps 30"),
        ("sine", "--seeds", "--seeds (none): give one or more, each once"),
        ("sine", "--iterations 49", "--iterations 49: give a whole number of at least 50"),
        ("sine", "--phase 1 1", "--phase 1.0 1.0: give numbers that rise"),
    ],
)
def test_invalid_flags_are_refused(load, monkeypatch, capsys, tmp_path, name, given, message):
    """One line that names the flag and its value, exit code 2, and nothing written or measured."""
    script = load(name)
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *given.split()])
    monkeypatch.setattr(script, "measure", lambda _: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        load("flags").run(script.main)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
