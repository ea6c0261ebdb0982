"""Imports the modules of an experiment, which have plain names such as `config` in every folder."""

import importlib
import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NAMES = {path.stem for path in EXPERIMENTS.rglob("*.py")}
_loaded = {}  # folder -> {name: module}; each is imported once, so that tests share its compiled functions


def load(name, folder):
    """A module of experiments/FOLDER, or one that all experiments share."""
    modules, path = _loaded.setdefault(folder, {}), sys.path[:]
    for other in NAMES:
        sys.modules.pop(other, None)
    sys.modules.update(modules)
    sys.path[:0] = [str(EXPERIMENTS / folder), str(EXPERIMENTS)]
    try:
        return importlib.import_module(name)
    finally:
        sys.path[:] = path
        modules.update((other, sys.modules[other]) for other in NAMES if other in sys.modules)


def in_this_process(monkeypatch, record):
    """Runs are made in this process, where they find what the test has changed."""
    from concurrent.futures import Future

    class Here:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, run, *choices):
            done = Future()
            done.set_result(run(*choices))
            return done

    monkeypatch.setattr(record, "ProcessPoolExecutor", Here)
