"""Runs multi_device/ in a process of its own, whose CPU counts as four devices."""

import pytest
import several_devices
from rare import cases


@pytest.mark.parametrize("tests", cases(["not slow", "slow"], ["not slow"]))
def test_on_four_devices(tests):
    several_devices.run("multi_device", 4, tests)
