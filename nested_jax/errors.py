"""The error for what the user can put right."""

from __future__ import annotations

import numbers
import typing
from typing import Any


class UserError(ValueError):
    """A mistake of the user's, told in one line: the thing, its value, the remedy."""


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether it is a whole number of at least so many; True and 2.0 are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least


def assert_choices(config: Any, prefix: str) -> None:
    """Raises UserError for the first field of a config that is none of the values of its Literal."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is typing.Literal:
            assert_choice(f"{prefix}.{name}", getattr(config, name), typing.get_args(hint))


def assert_choice(thing: str, value: Any, known: tuple) -> None:
    """Raises UserError, naming the thing, for a value that is none of those known."""
    if value not in known:
        raise UserError(f"{thing} {value!r} is unknown: give one of {', '.join(map(str, known))}")
