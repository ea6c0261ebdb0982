"""What is shown of a run while it runs."""

import io
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from nested_jax.train import progress
from nested_jax.train.progress import Display, announced


@pytest.fixture
def clock(monkeypatch):
    """The time that the display reads, which only a test moves."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_lines_have_the_speed_from_the_first_step_on_and_count_evaluations(clock):
    console = Console(file=io.StringIO(), width=200)
    with Display(console, 5, 15, evaluations=lambda step: 2) as display:
        for seconds in (90, 30):  # the first one may compile
            with display.evaluating():
                clock.seconds += seconds
        clock.seconds += 2
        speeds = display.update(6, 200, epoch=0.25, loss=2.0, bits_per_byte=3.0)
        assert speeds == pytest.approx({"tokens_per_second": 100})
        clock.seconds += 4
        speeds = display.update(7, 200, epoch=0.5, loss=2.0, bits_per_byte=3.0)
        assert speeds == pytest.approx({"tokens_per_second": 200 * 1.8 / (2 * 0.8 + 4)})
        clock.seconds += 20
        display.update(8, 200, epoch=0.75, loss=1.5, bits_per_byte=2.5)
    first, second = console.file.getvalue().splitlines()
    assert first == "step 6/15  epoch 0.25  loss 2.000  3.000 bits/byte  100 tokens/s  1:18 left"
    assert second.startswith("step 8/15  epoch 0.75  loss 1.500")


def test_lines_have_the_share_of_the_devices_speed_and_their_memory_where_they_are_known(clock):
    console = Console(file=io.StringIO(), width=200)
    with Display(console, 0, 10, work=0.5) as display:
        clock.seconds += 2
        speeds = display.update(1, 100, loss=2.0, memory=3.14159)
    assert speeds == pytest.approx({"tokens_per_second": 50, "utilization": 0.25})
    assert console.file.getvalue() == "step 1/10  loss 2.000  25.0% MFU  3.14 GB  50 tokens/s  0:18 left\n"


def test_the_last_line_of_a_bar_stays():
    console = Console(file=io.StringIO(), width=150, force_terminal=True)
    with Display(console, 0, 2) as display:
        for step in (1, 2):
            display.update(step, 100, epoch=0.5, loss=2.0, bits_per_byte=3.0)
    drawn = console.file.getvalue()
    assert "\x1b[2K" not in drawn[drawn.rindex("step 2/2") :]  # is not erased


def test_what_takes_seconds_is_announced(capsys, monkeypatch):
    with announced("compiling the model", seconds=0.0):
        time.sleep(0.2)
    with announced("quick", seconds=60):
        pass
    monkeypatch.setattr(progress, "first", lambda: False)
    with announced("in another process", seconds=0.0):
        time.sleep(0.2)
    assert capsys.readouterr().err == "compiling the model\n"
