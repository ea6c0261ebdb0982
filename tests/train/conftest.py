"""Runs small enough to be made many times, and finished ones to copy."""

import functools
import io
import pydoc_data.topics
import shutil

import pytest
from rich.console import Console
from tiny_run import small_config

from nested_jax.train.config import TrainConfig
from nested_jax.train.loop import train


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    """The path of a file of prose, 200 kB."""
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(pydoc_data.topics.topics.values())[:200_000])
    return str(path)


@pytest.fixture
def small(tmp_path, text):
    """A function that makes a TrainConfig of a second, its fields changed."""

    return lambda run="run", **fields: small_config(text, tmp_path / run, **fields)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory, text):
    """A function that returns the config and the last state of a run of so many steps, which others only read."""

    @functools.cache
    def run(steps: int):
        config = small_config(text, tmp_path_factory.mktemp("finished") / "run", steps=steps)
        return config, train(config, Console(file=io.StringIO()))

    return run


@pytest.fixture
def finished(small, trained_once):
    """A function that copies a finished run of so many steps and returns (its config, its last state)."""

    def copy(steps: int = 6, run: str = "run"):
        config, state = trained_once(steps)
        shutil.copytree(config.run_dir, small(run).run_dir)
        return small(run, steps=steps), state

    return copy


@pytest.fixture
def quiet():
    """A function that trains and returns (state, what was printed)."""

    def run(config: TrainConfig):
        console = Console(file=io.StringIO(), width=200)
        return train(config, console), console.file.getvalue()

    return run


@pytest.fixture(scope="session", autouse=True)
def compile_cache(compiled_once):
    """For every test here: most of them train the same small model."""
