"""What a level says of itself, as plain data: `nested_jax.picture` makes tables and figures of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Rule = tuple[Callable, Callable]  # (init, update), as optax's transformations


@dataclass(frozen=True)
class Description:
    """What something that learns says of itself, for `nested_jax.describe`, where that cannot be derived from what it does.

    A `Level` is given one; a class of optimizer states or of sequence layers has one as its attribute `description`.

    Args:
        objective: what its updates descend; None for a level that does not learn, but passes its context on.
        rule: how it descends.
        context: the context flow that it compresses.
        knowledge: what it is given by other levels, beside a start that is one of their functions.
        updates: how often one step updates the state: more than once where the step is a parallel form of many; infinity for
            what solves its objective anew at every query.
        inner: memories whose new state its update reads at the same moment, so that each is a faster level (NL Def. 2),
            fastest first: in words, or optax transformations, which are described by what they do.
        name: of an inner memory.
    """

    objective: str | None = ""
    rule: str = ""
    context: str = ""
    knowledge: str = ""
    updates: float = 1
    inner: tuple[Description | Rule, ...] = ()
    name: str = "memory"
