"""Compiled programs are kept where they are said to be, and read from there."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from nested_jax.errors import UserError
from nested_jax.train.compilation import keep_compiled

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def unset():
    """JAX without a cache, and with that of the other tests afterwards."""
    before = [getattr(jax.config, name) for name in NAMES]
    jax.config.update(NAMES[0], None)
    yield
    for name, value in zip(NAMES, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_the_second_start_reads_what_the_first_one_compiled(unset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled()
    folder = Path(jax.config.jax_compilation_cache_dir)
    assert folder.parent == tmp_path / "nested_jax" and folder.stat().st_mode & 0o777 == 0o700
    jax.config.update(NAMES[1], 0.0)
    read = []
    note = lambda event, **of: read.append(event)
    jax.monitoring.register_event_listener(note)
    try:
        for hits in (0, 1):
            jax.jit(lambda x: jnp.sin(x) * 3.25 + 1.125)(jnp.float32(2))  # a function of its own each time, one program
            assert read.count("/jax/compilation_cache/cache_hits") == hits
    finally:
        jax.monitoring.unregister_event_listener(note)
    assert any(folder.iterdir())


def test_where_programs_are_kept(unset, monkeypatch, tmp_path):
    keep_compiled(str(tmp_path / "own"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    keep_compiled()  # JAX's own setting
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    keep_compiled("none")
    assert jax.config.jax_compilation_cache_dir is None
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled()  # the user has no cache folder: none
    assert jax.config.jax_compilation_cache_dir is None
    with pytest.raises(UserError, match="--compilation-cache .*file/x cannot be written to: .*; give another"):
        keep_compiled(str(tmp_path / "file" / "x"))
