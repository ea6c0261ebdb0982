"""Annotations are true: under jaxtyping's import hook with beartype every call of the package passes what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

from nested_jax import PRESETS


@pytest.mark.slow
def test_the_package_runs_under_the_import_hook():
    """All tiny families, forward, backward and in pieces; training steps; the picture; in a process of its own."""
    script = Path(__file__).with_name("annotated_run.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, cwd=script.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    families = [name for name in PRESETS if name.startswith("tiny-")]
    assert done.stdout.splitlines()[: len(families)] == families
    assert "picture and surprise" in done.stdout
