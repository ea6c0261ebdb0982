"""The program `nested-jax`, also `python -m nested_jax`: signals are answered before anything large is imported."""

from __future__ import annotations

import sys

from nested_jax.train.stopping import watch


def run() -> int:
    """Runs the command of the process's words. Returns the exit code."""
    watch()
    from nested_jax.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
