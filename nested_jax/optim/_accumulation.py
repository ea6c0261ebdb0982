"""Refusal to sum gradients of several steps for a rule that also needs those steps' inputs."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import optax

from nested_jax.errors import UserError

_sums: ContextVar[str | None] = ContextVar("what sums the gradients that a rule is given", default=None)


@contextlib.contextmanager
def accumulating(name: str, period: Any) -> Iterator[None]:
    """While rules are given sums of the gradients of `period` steps by what has this name."""
    one = isinstance(period, int) and period == 1
    token = _sums.set(_sums.get() if one else name)
    try:
        yield
    finally:
        _sums.reset(token)


def refuse_sums(rule: str, things: str) -> None:
    """Raises UserError inside `accumulating` and inside `optax.MultiSteps`, which passes on the last step's extra arguments.

    optax passes a rule nothing that says so: a MultiSteps object is looked for among the callers' variables.
    """
    within = lambda frame: isinstance(frame.f_locals.get("self"), optax.MultiSteps)
    name = _sums.get() or ("optax.MultiSteps" if any(within(frame) for frame, _ in traceback.walk_stack(None)) else None)
    if name:
        raise UserError(
            f"{rule}: {name} sums gradients of several steps and passes on {things} of the last step alone: average the "
            f"gradients, concatenate {things} of all steps, and call update once"
        )
