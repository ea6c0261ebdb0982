"""A run small enough to be made many times."""

import io
import pydoc_data.topics

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console
from tiny_run import small_model

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

    def make(run: str = "run", **fields) -> TrainConfig:
        sizes = {"window": 32, "batch": 4, "steps": 6, "warmup": 2, "sample_tokens": 0, "model": small_model()}
        every = {"eval_every": 3, "eval_bytes": 2000, "checkpoint_every": 2, "log_every": 1}
        own = {"data": text, "run_dir": str(tmp_path / run)}
        return TrainConfig.from_preset("tiny-transformer", **(sizes | every | own | fields))

    return make


@pytest.fixture
def quiet():
    """A function that trains and returns (state, what was printed)."""

    def run(config: TrainConfig):
        console = Console(file=io.StringIO(), width=200)
        return train(config, console), console.file.getvalue()

    return run


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Keeps compiled programs between tests: most of them train the same small model."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
