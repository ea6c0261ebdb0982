"""Checks of hyperparameters where a transformation is made."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from nested_jax.checks import Interval
from nested_jax.errors import UserError, is_whole
from nested_jax.typing import Array

ANY = Interval()
NON_NEGATIVE = Interval(least=0)
POSITIVE = Interval(above=0)
UP_TO_ONE = Interval(least=0, most=1)
BELOW_ONE = Interval(least=0, below=1)


def check(rule: str, interval: Interval = ANY, **values: Any) -> None:
    """Raises UserError for the first value that is not a finite number, or an array of them, in the interval.

    Traced values and schedules pass.
    """
    for name, value in values.items():
        if callable(value) or isinstance(value, Tracer):
            continue
        numbers = np.asarray(value)
        if not jnp.issubdtype(numbers.dtype, jnp.number):
            raise UserError(f"{rule}: {name} {value!r} is no number: give one")
        if not np.all(np.isfinite(numbers)):
            raise UserError(f"{rule}: {name} {value} is not finite: give a finite number")
        if not all(float(number) in interval for number in numbers.flat):
            low = (
                ""
                if numbers.dtype.itemsize > 2
                else f" (optax.inject_hyperparams made it {numbers.dtype}: hyperparam_dtype)"
            )
            raise UserError(f"{rule}: {name} {value} is out of range: give a number {interval}{low}")


def check_count(rule: str, **values: Any) -> None:
    """Raises UserError for the first value that is not a whole number of at least 1. Traced ones pass."""
    for name, value in values.items():
        if isinstance(value, jax.Array | np.ndarray) and value.shape == () and jnp.issubdtype(value.dtype, jnp.integer):
            whole = isinstance(value, Tracer) or int(value) >= 1
        else:
            whole = is_whole(value)
        if not whole:
            raise UserError(f"{rule}: {name} {value!r} is out of range: give a whole number of at least 1")


def as_size(rule: str, name: str, value: Any) -> int:
    """A whole number of at least 1 that is the size of an array, and so cannot be traced."""
    if isinstance(value, Tracer):
        raise UserError(
            f"{rule}: {name} {value} is traced, and is the size of an array: leave it out, or name it in static_args of "
            f"optax.inject_hyperparams"
        )
    check_count(rule, **{name: value})
    return int(value)


def check_functions(rule: str, **values: Any) -> None:
    """Raises UserError for the first value that is neither a function nor None."""
    for name, value in values.items():
        if value is not None and not callable(value):
            raise UserError(
                f"{rule}: {name} {value!r} is no function: give one, to optax.inject_hyperparams with static_args={name!r}"
            )


def next_count(count: Array) -> Array:
    """count + 1, without overflow."""
    return jnp.asarray(optax.safe_increment(count))


def learning_rate_at(learning_rate: optax.ScalarOrSchedule, count: Array) -> Array:
    """The learning rate after `count` steps."""
    return jnp.asarray(learning_rate(count) if callable(learning_rate) else learning_rate)
