"""Runs eight_devices/ in a process of its own, whose CPU counts as eight devices."""

import pytest
import several_devices
from rare import cases


@pytest.mark.parametrize("tests", cases(["not slow", "slow"], ["not slow"]))
def test_on_eight_devices(tests):
    several_devices.run("eight_devices", 8, tests)
