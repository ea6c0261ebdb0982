"""Runs a folder of tests in a process of its own, whose CPU counts as several devices."""

import os
import subprocess
import sys
from pathlib import Path


def run(folder: str, devices: int, tests: str) -> None:
    """Fails unless the folder has tests that are marked so, and all of them pass."""
    path = str(Path(__file__).parent / folder)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", "-m", tests, path]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]  # 5, no test at all, is a failure too
