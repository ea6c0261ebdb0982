"""Runs multi_device/ and eight_devices/ in processes of their own, whose CPU counts as four and as eight devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rare import cases

FOLDERS = {"multi_device": 4, "eight_devices": 8}


@pytest.mark.parametrize("tests", cases(["not slow", "slow"], ["not slow"]))
@pytest.mark.parametrize("folder", FOLDERS)
def test_on_several_devices(folder, tests):
    path = str(Path(__file__).parent / folder)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", "-m", tests, path]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(FOLDERS[folder])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]  # 5, no test at all, is a failure too
