"""How a run ends early: by a signal, taken as a wish that is granted between two updates, or by a broken number."""

from __future__ import annotations

import signal
import threading


class Interrupted(KeyboardInterrupt):
    """A run was saved and stopped by a signal: the message says how to go on, `signal` which one it was."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


class NonFinite(ArithmeticError):
    """Training met a number that is infinite or not a number: says at which step, in which level and leaf."""


class Interruption:
    """While entered, the first SIGINT or SIGTERM is noted in `signal`; a second one acts as usual."""

    def __init__(self):
        self.signal: int | None = None
        self._before = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def release(self) -> None:
        """From now on, signals act as usual."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame) -> None:
        self.signal = number
        self.release()
