"""Flags of an experiment: what cannot be is told in one line, before anything is computed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from nested_jax.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Calls a script's main; a mistake of the user's is one line and exit code 2."""
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def assert_each(config: Any, fits: Callable[[np.ndarray], np.ndarray], words: str, *names: str) -> None:
    """Raises UserError for the first of these flags without a number, or with one that is not finite or does not fit."""
    for name in names:
        values = np.ravel(np.array(getattr(config, name), float))
        if not values.size or not (np.isfinite(values) & fits(values)).all():
            raise UserError(f"{_given(config, name)} must be {words}")


def assert_positive(config: Any, *names: str) -> None:
    assert_each(config, lambda values: values > 0, "above 0", *names)


def assert_at_least(config: Any, low: float, *names: str) -> None:
    assert_each(config, lambda values: values >= low, f"at least {low}", *names)


def assert_seeds(config: Any) -> None:
    assert_each(config, lambda values: (values >= 0) & (values < 2**31), "at least 0 and below 2**31", "seeds")
    assert_distinct(config, "seeds")


def assert_distinct(config: Any, *names: str) -> None:
    """Raises UserError for the first of these flags that has nothing, or something twice."""
    for name in names:
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f"{_given(config, name)}: give one or more, each once")


def _given(config: Any, name: str) -> str:
    values = np.ravel(getattr(config, name)).tolist()
    return f"--{name.replace('_', '-')} {' '.join(map(str, values)) or '(none)'}"
