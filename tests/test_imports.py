"""What an import of the package brings along, and its metadata."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import nested_jax
from nested_jax import _xla_flags

HEAVY = ("tyro", "matplotlib", "tensorflow_datasets", "orbax", "grain", "tensorboardX", "sentencepiece")


def loaded_by(statement: str) -> set[str]:
    """Modules that a fresh interpreter has after a statement."""
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


def test_the_package_imports_no_command_line_plots_or_data_sets():
    """Of rich and orbax no more than flax, jax and optax import themselves."""
    others = loaded_by("import jax, optax, flax.nnx")
    own = loaded_by("from nested_jax import *") - others
    assert "nested_jax" in own
    found = {name for name in own if name.split(".")[0] in (*HEAVY, "rich")}
    assert not found, found


def test_a_name_is_imported_when_it_is_asked_for():
    """So that the command line answers signals from its first line on."""
    assert not {"jax", "numpy"} & loaded_by("import nested_jax.__main__")
    homes = [name for names in nested_jax._HOMES.values() for name in names]
    assert sorted([*homes, "load"]) == sorted(nested_jax.__all__)
    assert all(hasattr(nested_jax, name) for name in (*nested_jax.__all__, "optim", "train"))
    assert not hasattr(nested_jax, "no_such_name") and set(nested_jax.__all__) <= set(dir(nested_jax))


def test_version_and_type_information():
    assert nested_jax.__version__ == version("nested-jax")
    assert (Path(nested_jax.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize(
    ("jaxlib", "given", "flags"),
    [
        ("0.10.2", None, f"{_xla_flags._FLAG}=-REDUCE"),
        ("0.11.0", "--xla_dump_to=x", f"--xla_dump_to=x {_xla_flags._FLAG}=-REDUCE"),
        ("0.10.2", f"{_xla_flags._FLAG}=DOT", f"{_xla_flags._FLAG}=DOT"),
        ("0.11.1", "--xla_dump_to=x", "--xla_dump_to=x"),
    ],
)
def test_a_flag_is_added_where_jaxlib_needs_it(monkeypatch, jaxlib, given, flags):
    """Beside those that are set; one of the same name stays."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if given:
        monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setattr(_xla_flags, "version", {"jaxlib": jaxlib}.get)
    _xla_flags.avoid_crash()
    assert os.environ["XLA_FLAGS"] == flags


def test_sums_over_many_axes_do_not_crash(monkeypatch):
    """jaxlib 0.10.2 and 0.11.0 end the process here, or hang, without the flag."""
    code = (
        "import nested_jax, jax, jax.numpy as jnp; x = jnp.ones((3, 1, 2, 2, 8, 8, 8));"
        "print(jax.jit(lambda a, b: (a * b).sum(3))(x, x).sum())"
    )
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "6144.0\n"), done.stderr[-500:]
