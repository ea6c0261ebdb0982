"""The error for what the user can put right."""

from __future__ import annotations

import typing
from typing import Any


class UserError(ValueError):
    """A mistake of the user's, told in one line: the thing, its value, the remedy."""


def assert_choices(config: Any, prefix: str) -> None:
    """Raises UserError for the first field of a config that is none of the values of its Literal."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is typing.Literal:
            assert_choice(f"{prefix}.{name}", getattr(config, name), typing.get_args(hint))


def assert_choice(thing: str, value: Any, known: tuple) -> None:
    """Raises UserError, naming the thing, for a value that is none of those known."""
    if value not in known:
        raise UserError(f"{thing} {value!r} is unknown: give one of {', '.join(map(str, known))}")
