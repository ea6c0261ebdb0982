"""Command-line flags of an experiment: read, checked where the config is made, and refused in one line."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import numpy as np
import tyro

from nested_jax.checks import Count, Interval, Positive, check_fields
from nested_jax.errors import UserError

Seed = Annotated[int, Interval(least=0, below=2**31)]
Counts, Rates, Seeds = tuple[Count, ...], tuple[Positive, ...], tuple[Seed, ...]


def run(main: Callable[[], None]) -> None:
    """Calls a script's main; a UserError is printed as one line, with exit code 2."""
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def parse(kind: type) -> Any:
    """The config that the command line gives.

    Raises:
        UserError: the config's own error, which tyro would print in a box.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind)
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause := cause.__context__:
            if isinstance(cause, UserError):
                raise cause from None
        print(box.getvalue(), end="", file=sys.stderr)
        raise


def check(config: Any, *distinct: str) -> None:
    """Checks a config's fields against their annotations, and that those named have values, each once.

    Raises:
        UserError: the flag, its value and what to give.
    """
    check_fields(config, flag)
    for name in distinct:
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f"{given(config, name)}: give one or more, each once")


def check_known(config: Any, name: str, known: Iterable[str]) -> None:
    """Raises UserError if a field has a value that is not among the known ones."""
    known = tuple(known)
    for value in getattr(config, name):
        if value not in known:
            names = ", ".join(repr(one) if "," in one else one for one in known)
            raise UserError(f"{flag(name)} {value!r}: give one of {names}")


def check_rising(config: Any, *names: str) -> None:
    """Raises UserError for the first field whose numbers do not rise."""
    for name in names:
        values = getattr(config, name)
        if any(low >= high for low, high in zip(values, values[1:], strict=False)):
            raise UserError(f"{given(config, name)}: give numbers that rise")


def check_tuning(config: Any) -> None:
    """Raises UserError if a config's tuning seed is one of its seeds."""
    if config.tuning_seed in config.seeds:
        raise UserError(f"--tuning-seed {config.tuning_seed} is one of --seeds: give another")


def flag(name: str) -> str:
    """The flag of a field.

    >>> flag("test_tasks")
    '--test-tasks'
    """
    return f"--{name.replace('_', '-')}"


def given(config: Any, name: str) -> str:
    """A flag with its values, as on the command line."""
    values = np.ravel(getattr(config, name)).tolist()
    return f"{flag(name)} {' '.join(map(str, values)) or '(none)'}"
