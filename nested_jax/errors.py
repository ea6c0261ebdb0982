"""The error for what the user can correct."""

from __future__ import annotations

import numbers
from typing import Any

import jax
import numpy as np


class UserError(ValueError):
    """An input that cannot be used. Its message is one line: the thing, its value, the remedy."""


def shown(value: Any) -> str:
    """A value in a line of an error: of an array its type and shape, else the first 60 characters.

    >>> shown("tiny-hope"), shown(range(10**3)), len(shown("x" * 99))
    ("'tiny-hope'", 'range(0, 1000)', 60)
    """
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return " ".join(repr(value).split())[:60]


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether a value is a whole number of at least `least`. True and 2.0 are none.

    >>> is_whole(1), is_whole(0), is_whole(True), is_whole(2.0)
    (True, False, False, False)
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def assert_choice(thing: str, value: Any, choices: tuple) -> None:
    """Raises UserError, naming the thing, for a value that is none of the choices.

    >>> assert_choice("sum: form", "qick", ("quick", "exact"))
    Traceback (most recent call last):
    nested_jax.errors.UserError: sum: form 'qick' is unknown: give one of quick, exact
    """
    if value not in choices:
        raise UserError(f"{thing} {value!r} is unknown: give one of {', '.join(map(str, choices))}")
