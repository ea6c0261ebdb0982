"""Checks of hyperparameters where a transformation is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.errors import UserError, is_whole
from nested_jax.typing import Array


def check(
    rule: str,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
    below: float = math.inf,
    **values: Any,
) -> None:
    """Raises UserError for the first value that is no finite number, or not in [low, high], above `above` and below `below`.

    Traced values and schedules pass.
    """
    for name, value in values.items():
        if callable(value) or isinstance(value, jax.core.Tracer):
            continue
        numbers = np.asarray(value)
        if not jnp.issubdtype(numbers.dtype, jnp.number):
            raise UserError(f"{rule}: {name} {value!r} is no number: give one")
        if not np.all(np.isfinite(numbers)):
            raise UserError(f"{rule}: {name} {value} is not finite")
        if not np.all((low <= numbers) & (above < numbers) & (numbers <= high) & (numbers < below)):
            start = f"above {above:g}" if above > -math.inf else f"of at least {low:g}"
            end = f" and below {below:g}" if below < math.inf else f" and at most {high:g}" if high < math.inf else ""
            raise UserError(f"{rule}: {name} {value} is out of range: give a number {start}{end}")


def check_period(rule: str, **values: Any) -> None:
    """Raises UserError for the first value that is not a whole number of at least 1."""
    for name, value in values.items():
        if not is_whole(value):
            raise UserError(f"{rule}: {name} {value!r} is no period: give a whole number of steps, at least 1")


def check_count(rule: str, **values: Any) -> None:
    """Raises UserError for the first value that is not a whole number of at least 1."""
    for name, value in values.items():
        if not is_whole(value):
            raise UserError(f"{rule}: {name} {value!r} is out of range: give a whole number of at least 1")


def rate_at(learning_rate: float | Callable, count: Array) -> Array:
    """A learning rate's value at a step."""
    return jnp.asarray(learning_rate(count) if callable(learning_rate) else learning_rate)
