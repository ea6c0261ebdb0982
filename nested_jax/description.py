"""The description of a level, as plain data, from which `nested_jax.picture` makes tables and figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Transformation = tuple[Callable, Callable]  # (init, update), as optax's transformations


@dataclass(frozen=True)
class Description:
    """The objective and rule of something that learns, for `nested_jax.describe`, which cannot derive them from its step.

    A `Level` has one as its field `description`, a class of optimizer states as its attribute `description`.

    Args:
        objective: what its updates minimise; None for a level that does not learn and only emits.
        rule: its update.
        context: the context flow that it compresses.
        knowledge: how knowledge of other levels reaches it, except a start that is a function of their states.
        updates: how often one step updates the state: more than once where the step is a parallel form of many; infinity for
            what solves its objective anew at every query.
        inner: memories whose new state its update reads at the same moment, so that each is a faster level (NL Def. 2),
            fastest first: in words, or optax transformations, which are described by what they do.
        name: of an inner memory.

    >>> Description("1/2 |m - x|^2", "gradient descent").objective
    '1/2 |m - x|^2'
    """

    objective: str | None = ""
    rule: str = ""
    context: str = ""
    knowledge: str = ""
    updates: float = 1
    inner: tuple[Description | Transformation, ...] = ()
    name: str = "memory"
