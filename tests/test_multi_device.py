"""Runs multi_device/ in a process of its own, whose CPU counts as four devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rare import cases

FOLDER = Path(__file__).parent / "multi_device"


@pytest.mark.parametrize("tests", cases(["not slow", "slow"], ["not slow"]))
def test_on_four_devices(tests):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", "-m", tests, str(FOLDER)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]  # 5, no test at all, is a failure too
