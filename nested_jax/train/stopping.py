"""Early ends of a run: a signal, or numbers that show that it has diverged.

While JAX compiles, for seconds, no Python handler of a signal runs. So the program answers signals in a thread of its own
(`watch`); where the library is used without it, handlers do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable
from typing import ClassVar

_STOPS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)  # in the order in which they are caught


class Interrupted(KeyboardInterrupt):
    """A signal stopped a run, which was saved.

    Args:
        message: where it stopped, and the command that resumes it.
        number: of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


class Diverged(ArithmeticError):
    """The training goes away from its goal. The message has the step, the numbers that show it, and the remedy."""


class NonFinite(Diverged):
    """A number of the training is infinite or NaN. The message has its step, level and leaf."""


class Interruption:
    """A context in which the first SIGINT, SIGTERM or SIGHUP only sets `signal`. A second one acts as usual.

    Args:
        say: is called at the first one, with a line for the user.

    >>> with Interruption() as interruption:
    ...     signal.raise_signal(signal.SIGTERM)
    >>> interruption.signal == signal.SIGTERM
    True
    """

    watched: ClassVar[bool] = False
    """Whether `watch` answers the signals of this process."""
    current: ClassVar[Interruption | None] = None
    """The one that it gives the next signal to."""

    def __init__(self, say: Callable[[str], None] = lambda line: None):
        self.signal: int | None = None
        self._say = say
        self._before = {}

    def __enter__(self) -> Interruption:
        if Interruption.watched:
            Interruption.current = self
        elif threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self.note) for number in _answered()}
        return self

    def __exit__(self, *_) -> None:
        self._release()

    def note(self, number: int, frame=None) -> None:
        """Takes a signal."""
        self._release()
        self.signal = number
        if number == signal.SIGHUP:
            _leave_terminal()
        with contextlib.suppress(OSError, RuntimeError):  # a terminal that is gone, or in the middle of a line
            self._say("stopping after this step; again to stop now")

    def _release(self) -> None:
        """Signals act as usual."""
        Interruption.current = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def watch() -> None:
    """From now on a signal is answered at once, whatever the main thread does.

    The process ends with one line and the code 128 + signal, except in an `Interruption`, which only takes note.
    """
    receive, send = os.pipe()
    os.set_blocking(send, False)
    Interruption.watched = True
    threading.Thread(target=_answer, args=(receive,), daemon=True).start()
    signal.set_wakeup_fd(send)  # which Python writes the signal's number to, from any thread
    for number in _answered():
        signal.signal(number, lambda *_: None)


def _answered() -> list[int]:
    """SIGINT, SIGTERM and, unless the process was started to ignore it, as by nohup, SIGHUP."""
    return [number for number in _STOPS if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN]


def _answer(receive: int) -> None:
    while True:
        number = os.read(receive, 1)[0]
        if number in _STOPS and (interruption := Interruption.current):
            interruption.note(number)
        elif number in _STOPS:
            _end(number)


def _end(number: int) -> None:
    """Ends the process without Python's own end, which a compilation that goes on would hold up or crash."""
    if number == signal.SIGHUP:
        _leave_terminal()
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # the cursor, which a bar hides
        os.write(2, b"\n" * os.isatty(2) + b"nested-jax: stopped; what was saved before is kept\n")
    os._exit(128 + number)


def _leave_terminal() -> None:
    """Sends what is printed to a terminal that has hung up nowhere, so that it is no error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # not a file, as where tests capture it
            if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):
                os.dup2(nowhere, stream.fileno())
