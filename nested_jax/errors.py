"""The error for what the user can put right."""

from __future__ import annotations

import typing
from typing import Any


class UserError(ValueError):
    """A mistake of the user's, told in one line: the thing, its value, the remedy."""


def assert_choices(config: Any, prefix: str) -> None:
    """Raises UserError for the first field of a config that is none of the values of its Literal."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is typing.Literal and (value := getattr(config, name)) not in typing.get_args(hint):
            known = ", ".join(map(str, typing.get_args(hint)))
            raise UserError(f"{prefix}.{name} {value!r} is unknown: give one of {known}")
