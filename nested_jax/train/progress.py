"""Progress of a run: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from nested_jax.parallel.processes import first


def print_line(console: Console, line: str) -> None:
    """Prints one line, without wrapping, highlighting or markup."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


@contextlib.contextmanager
def announced(what: str, seconds: float = 1.0) -> Iterator[None]:
    """A context that says what it does on the first process' standard error, if that takes more than so many seconds."""
    timer = threading.Timer(seconds, lambda: print(what, file=sys.stderr, flush=True))
    timer.daemon = True
    if first():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


_FORMATS = {
    "epoch": "epoch {:.2f}",
    "loss": "loss {:.3f}",
    "bits_per_byte": "{:.3f} bits/byte",
    "utilization": "{:.1%} MFU",
    "memory": "{:.2f} GB",
}


class Display:
    """A context that shows updates.

    Args:
        console: where they are shown.
        step: updates made before.
        steps: updates in all.
        evaluations: of a step, the number of evaluations after it.
        seconds: between two lines, where the console is no terminal.
        unit: what targets are.
        work: seconds that the devices would take for an update's matrix products at their greatest speed; None: not known.
    """

    def __init__(
        self,
        console: Console,
        step: int,
        steps: int,
        *,
        evaluations: Callable[[int], int] = lambda step: 0,
        seconds: float = 10,
        unit: str = "tokens",
        work: float | None = None,
    ):
        self._console, self._first, self._steps, self._seconds = console, step, steps, seconds
        self._evaluations, self._evaluation, self._unit, self._work = evaluations, math.inf, unit, work
        self._shown = self._before = time.monotonic()
        self._tokens = self._busy = 0.0  # of the last updates, and the seconds that they took
        words = TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[numbers]}")
        self._bar = Progress(*words, console=console)
        self._task = self._bar.add_task("", total=steps, completed=step, numbers="")

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._bar.start()
        self._shown = self._before = time.monotonic()
        return self

    def __exit__(self, *_) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def print_line(self, line: str) -> None:
        """Prints one line above the bar."""
        print_line(self._console, line)

    def print_table(self, table: Table) -> None:
        """Prints a table, as `print_line` does a line."""
        self._console.print(table)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context that is an evaluation: its time counts in the time left, not in the speed."""
        start = time.monotonic()
        yield
        passed = time.monotonic() - start
        self._evaluation = min(self._evaluation, passed)
        self._before += passed

    def update(self, step: int, tokens: int, **numbers: float) -> dict[str, float]:
        """Shows an update.

        Args:
            step: updates made.
            tokens: targets of this one.
            **numbers: to show: of text `epoch`, the times that it was read, `loss`, nats per target, `bits_per_byte`, and
                `memory`, the most GB of a device.

        Returns:
            "tokens_per_second", averaged over the last updates, and where the devices' speed is known "utilization": the
            share of it that the update's matrix products are (MFU).
        """
        now = time.monotonic()
        self._tokens, self._busy = 0.8 * self._tokens + 0.2 * tokens, 0.8 * self._busy + 0.2 * (now - self._before)
        self._before, speed = now, self._tokens / max(self._busy, 1e-9)
        left = (self._steps - step) * tokens / max(speed, 1e-9)
        if further := self._evaluations(step):
            left += further * (self._evaluation if self._evaluation < math.inf else 0)
        speeds = {"tokens_per_second": speed} | ({"utilization": self._work * speed / tokens} if self._work else {})
        numbers |= speeds
        shown = [form.format(numbers[name]) for name, form in _FORMATS.items() if name in numbers]
        words = "  ".join([*shown, f"{speed:,.0f} {self._unit}/s", f"{_clock(left)} left"])
        self._bar.update(self._task, completed=step, numbers=words)
        if not self._console.is_terminal and (now - self._shown > self._seconds or step in (self._first + 1, self._steps)):
            self._shown = now
            print_line(self._console, f"step {step}/{self._steps}  {words}")
        return speeds


def _clock(seconds: float) -> str:
    """Minutes and seconds, from an hour on with hours.

    >>> _clock(59.7), _clock(3725)
    ('1:00', '1:02:05')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
