"""Early ends of a run: a signal, handled between two updates, or a number that is not finite."""

from __future__ import annotations

import signal
import threading


class Interrupted(KeyboardInterrupt):
    """A signal stopped a run, which was saved.

    Args:
        message: where it stopped, and the command that resumes it.
        number: of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


class NonFinite(ArithmeticError):
    """A number of the training is infinite or NaN. The message has its step, level and leaf."""


class Interruption:
    """A context in which the first SIGINT or SIGTERM only sets `signal`. A second one acts as usual.

    >>> with Interruption() as interruption:
    ...     signal.raise_signal(signal.SIGTERM)
    >>> interruption.signal == signal.SIGTERM
    True
    """

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
        """Restores the former handlers: signals act as usual."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame) -> None:
        self.signal = number
        self.release()
