"""Checks of frozen dataclasses at construction: types, choices and ranges, read from the fields' annotations.

A class calls `check_fields(self, "model.")` in its `__post_init__`, then checks what concerns several fields at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
import sys
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.errors import UserError, shown


class Interval(NamedTuple):
    """The range of a number, in a field's annotation.

    >>> 1.0 in Interval(above=0), 0.0 in Interval(above=0), f"a number {Interval(least=0, below=2**32)}"
    (True, False, 'a number of at least 0 and below 4294967296')
    """

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    finite: bool = True

    def __contains__(self, value: Any) -> bool:
        inside = self.least <= value <= self.most and self.above < value < self.below and is_finite(value)
        return bool(inside or (value == math.inf and not self.finite))

    def __str__(self) -> str:
        words = {"of at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {bound:.12g}" for word, bound in words.items() if abs(bound) < math.inf)


def is_finite(value: Any) -> bool:
    """Whether a number is finite as a float: a whole number may be too large for one.

    >>> is_finite(10**308), is_finite(10**400), is_finite(math.nan)
    (True, False, False)
    """
    return bool(abs(value) <= sys.float_info.max)


class Named(NamedTuple):
    """A string in a field's annotation that can be stored and shown: neither empty nor with what would steer a terminal.

    >>> allows(Annotated[str, Named("the path of a folder")], ""), describe_hint(Annotated[str, Named("a name")])
    (False, 'a name')
    """

    words: str
    """What it names."""

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, str) and bool(value) and not _UNPRINTABLE.search(value)


_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # bytes that are no UTF-8 too


Folder = Annotated[str, Named("the path of a folder")]
Count = Annotated[int, Interval(least=1)]  # a whole number of at least 1
NonNegative = Annotated[float, Interval(least=0)]
Positive = Annotated[float, Interval(above=0)]
Rate = Annotated[float, Interval(least=1e-6, most=1e6)]  # a largest learning rate, whose gates float32 holds


def check_fields(config: Any, label: str | Callable[[str], str]) -> None:
    """Raises UserError, naming field, value and what it may be, for the first field that its annotation does not allow.

    Args:
        config: an object of a dataclass whose annotations are of bool, int, float, str, Literal, tuple, None, dataclasses,
            unions of these, and numbers `Annotated` with an `Interval`. Other annotations are not checked.
        label: a prefix of the field's name in the error, or a function from the field's name to the words in its place.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Memory:
    ...     chunk: Count
    ...     rule: Literal["delta", "linear"] = "delta"
    ...     def __post_init__(self):
    ...         check_fields(self, "Memory: ")
    >>> Memory(2.5)
    Traceback (most recent call last):
    nested_jax.errors.UserError: Memory: chunk 2.5: give a whole number of at least 1
    >>> Memory(2, "dleta")
    Traceback (most recent call last):
    nested_jax.errors.UserError: Memory: rule 'dleta': give one of delta, linear
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if not allows(hint, value):
            field = label(name) if callable(label) else f"{label}{name}"
            raise UserError(f"{field} {shown(value)}: give {describe_hint(hint)}")


def check_key(thing: str, key: Any) -> None:
    """Raises UserError for what is no random key, naming the thing that asks for one.

    >>> check_key("LinearMemory", 0)
    Traceback (most recent call last):
    nested_jax.errors.UserError: LinearMemory: key 0: give jax.random.key(0)
    """
    dtype, shape = (key.dtype, key.shape) if isinstance(key, jax.Array | np.ndarray) else (None, None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    if not typed and not (dtype == np.uint32 and shape == (2,)):
        remedy = f"jax.random.key({key})" if isinstance(key, int) else "jax.random.key(seed)"
        raise UserError(f"{thing}: key {shown(key)}: give {remedy}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def allows(hint: Any, value: Any) -> bool:
    """Whether a value fits an annotation. True is not a number, 2.0 not a whole one; infinity needs an `Interval`.

    >>> allows(int, 2), allows(int, True), allows(float, 2), allows(tuple[Count, ...], (4, 0))
    (True, False, True, False)
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        intervals = [extra for extra in arguments[1:] if isinstance(extra, Interval)]
        if not all(value in extra for extra in arguments[1:] if isinstance(extra, Named)):
            return False
        if not intervals or not is_number(value):
            return allows(arguments[0], value)
        whole = arguments[0] is not int or isinstance(value, numbers.Integral)
        return whole and all(value in interval for interval in intervals)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(allows(one, value) for one in arguments)
    if origin is tuple:
        same = len(arguments) == 2 and arguments[1] is Ellipsis
        each = arguments[:1] * len(value) if same and isinstance(value, tuple) else arguments
        fits = isinstance(value, tuple) and len(value) == len(each) and all(map(allows, each, value))
        return fits and (typing.get_origin(arguments[0]) is not Literal or len(set(value)) == len(value))  # choices once
    if hint is int:
        return is_number(value) and isinstance(value, numbers.Integral)
    if hint is float:
        return is_number(value) and is_finite(value)
    if isinstance(hint, type) and (hint in (bool, str) or dataclasses.is_dataclass(hint)):
        return isinstance(value, hint)
    return value is None if hint is type(None) else True


def is_number(value: Any) -> bool:
    """Whether a value is a real number, not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def describe_hint(hint: Any) -> str:
    """What an annotation allows, in words.

    >>> describe_hint(tuple[Count, ...]), describe_hint(Literal["sqrt"] | Count | None)
    ('a tuple, each a whole number of at least 1', 'sqrt, a whole number of at least 1, or None')
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        if names := [extra.words for extra in arguments[1:] if isinstance(extra, Named)]:
            return names[0]
        intervals = [extra for extra in arguments[1:] if isinstance(extra, Interval)]
        finite = all(interval.finite for interval in intervals)
        plain = "a number" if arguments[0] is float and not finite else describe_hint(arguments[0])
        return " ".join([plain, *filter(None, map(str, intervals))])
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        *first, last = map(describe_hint, arguments)
        return f"{', '.join(first)}{',' * (len(first) > 1)} or {last}"
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
        once = " a different" if typing.get_origin(arguments[0]) is Literal else ""
        return f"a tuple{count}, each{once} {describe_hint(arguments[0])}"
    words = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a string", type(None): "None"}
    return words.get(hint) or f"a {getattr(hint, '__name__', hint)}"
