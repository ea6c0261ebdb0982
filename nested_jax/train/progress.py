"""Progress of a run: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def print_line(console: Console, line: str) -> None:
    """Prints one line, without wrapping, highlighting or markup."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


class Display:
    """A context that shows updates.

    Args:
        console: where they are shown.
        step: updates made before.
        steps: updates in all.
        seconds: between two lines, where the console is no terminal.
    """

    def __init__(self, console: Console, step: int, steps: int, *, seconds: float = 10):
        self._console, self._first, self._steps, self._seconds = console, step, steps, seconds
        self._shown = time.monotonic()
        self._before: float | None = None  # the last update's time; the first one compiles and is not counted
        self._speed = 0.0
        words = TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[numbers]}")
        self._bar = Progress(*words, TimeRemainingColumn(), TextColumn("left"), console=console, transient=True)
        self._task = self._bar.add_task("", total=steps, completed=step, numbers="compiling")

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._bar.start()
        else:
            print_line(self._console, "compiling the training step")
        return self

    def __exit__(self, *_) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def print_line(self, line: str) -> None:
        """Prints one line above the bar. The time since the last update does not count in the speed."""
        print_line(self._console, line)
        self._before = time.monotonic()

    def print_table(self, table: Table) -> None:
        """Prints a table, as `print_line` does a line."""
        self._console.print(table)
        self._before = time.monotonic()

    def update(self, step: int, tokens: int, *, loss: float, bits_per_byte: float) -> float:
        """Shows an update.

        Args:
            step: updates made.
            tokens: targets of this one.
            loss: nats per target.
            bits_per_byte: bits per byte of text.

        Returns:
            Tokens per second, averaged over the last updates.
        """
        now = time.monotonic()
        if self._before is not None:
            speed = tokens / max(now - self._before, 1e-9)
            self._speed = 0.8 * self._speed + 0.2 * speed if self._speed else speed
        self._before = now
        numbers = f"loss {loss:.3f}  {bits_per_byte:.3f} bits/byte  {self._speed:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, numbers=numbers)
        if not self._console.is_terminal and (now - self._shown > self._seconds or step in (self._first + 1, self._steps)):
            self._shown = now
            left = (self._steps - step) * tokens / max(self._speed, 1e-9) if self._speed else 0
            print_line(self._console, f"step {step}/{self._steps}  {numbers}  {left // 60:.0f}:{left % 60:02.0f} left")
        return self._speed
