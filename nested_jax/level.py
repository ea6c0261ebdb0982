"""Levels: everything that learns is a pure function (state, context chunk) -> (state, output) with a period.

A `Level` moves once every `period` ticks of its context flow. `nest` puts a fast level inside one step of a slow one;
`run` lets a level read a stream. Attention memories, CMS blocks, optimizers and the training loop are all of this kind
(NL Def. 2-4): they differ in their update frequency and in the context they compress.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.description import Description
from nested_jax.errors import UserError, shown
from nested_jax.remat import Checkpoint, scan, stream_length
from nested_jax.typing import Array, PyTree

Slower = tuple[PyTree, ...]


@dataclass(frozen=True)
class Level:
    """One level of a nested system.

    Args:
        init: slower -> state. `slower` is the tuple of the slower levels' states, nearest first.
        step: (state, context, slower) -> (state, emitted). `context` has a leading axis: the tokens of one period, or
            what the faster level emitted over its ticks.
        period: data points between two updates.
        tokens: of one data point: more than one where data points are chunks or segments. The update frequency is
            1 / (period tokens) a token.
        name: what tables and errors call it.
        due: for a level that counts its own data points, state -> whether its period has just ended. Such a level may
            be given less than a period at a time. Without it, a context cut short leaves the state as it was
            (NL Eq. 71: unchanged unless the period divides the count) and only what `step` emits is used.
        restart: (state, slower) -> state, what `nest(..., reset=True)` does to this level; the default is `init(slower)`.
        description: its objective, rule and context flow, for `nested_jax.describe`.
        parts: of a nest, its fast and its slow level, and whether the slow one resets the fast one.
        first_order: whether derivatives of its step leave out those of a gradient that it follows.

    Raises UserError for a period or tokens that are no whole number from 1.

    Source: NL Def. 2-4.

    >>> total = Level(lambda slower: jnp.zeros(()), lambda state, x, slower: (state + x.sum(), state), period=2)
    >>> state, emitted = run(total, None, jnp.ones(6))
    >>> float(state), emitted.tolist()
    (6.0, [0.0, 2.0, 4.0])
    """

    init: Callable[[Slower], PyTree]
    step: Callable[[PyTree, PyTree, Slower], tuple[PyTree, PyTree]]
    period: int
    name: str = "level"
    due: Callable[[PyTree], Array] | None = None
    restart: Callable[[PyTree, Slower], PyTree] | None = None
    description: Description = Description()
    parts: tuple[Level, Level, bool] | None = None
    tokens: int = 1
    first_order: bool = False

    def __post_init__(self):
        for field, value in (("period", self.period), ("tokens", self.tokens)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise UserError(f"level {self.name!r}: {field} {value!r}: give a whole number of at least 1")
        for field, value in (("init", self.init), ("step", self.step)):
            if not callable(value):
                raise UserError(f"level {self.name!r}: {field} {shown(value)}: give a function")
        if not isinstance(self.description, Description):
            raise UserError(f"level {self.name!r}: description {shown(self.description)}: give a Description")


class Nested(NamedTuple):
    """State of two nested levels."""

    slow: PyTree
    fast: PyTree


def nest(fast: Level, slow: Level, *, reset: bool = False) -> Level:
    """One step of `slow` around `slow.period / fast.period` steps of `fast`, as one level.

    The slow state is visible, read-only, to the fast level (first of its `slower`). What the fast level emits over its
    ticks, stacked, is the slow level's context: a level takes its share and hands the rest on.

    Args:
        fast: the level inside.
        slow: the level around it.
        reset: restart the fast level from the slow one each time the slow one has stepped (NL Eq. 72; MAML). Levels
            inside `fast` follow the `reset` of their own nest.

    Returns:
        A level of the slow one's period, with state `Nested`; it emits what the slow level emits.

    Raises:
        UserError: the periods do not divide one another, or data points are of different numbers of tokens.

    Source: NL Def. 2-4.

    >>> mean = Level(lambda slower: jnp.zeros(()), lambda s, x, slower: (s, x.mean() - slower[0]), period=2, name="mean")
    >>> drift = Level(lambda slower: jnp.zeros(()), lambda s, e, slower: (s + e.sum(), e), period=4, name="drift")
    >>> state, emitted = run(nest(mean, drift), None, jnp.arange(8.0))
    >>> float(state.slow), emitted.tolist()
    (8.0, [[0.5, 2.5], [1.5, 3.5]])
    """
    for name, level in (("fast", fast), ("slow", slow)):
        _assert_level(f"nest: {name}", level)
    if slow.tokens != fast.tokens:
        raise UserError(
            f"level {slow.name!r} has data points of {slow.tokens} tokens, the faster level {fast.name!r} of {fast.tokens}: "
            f"give both the same"
        )
    if slow.period % fast.period:
        raise UserError(
            f"period {slow.period} of level {slow.name!r} is not a multiple of period {fast.period} of the faster "
            f"level {fast.name!r}: choose periods that divide one another"
        )

    def init(slower):
        slow_state = slow.init(slower)
        return Nested(slow_state, fast.init((slow_state, *slower)))

    def step(state, context, slower):
        whole = stream_length(context) == slow.period
        fast_state, pieces = _advance(fast, state.fast, context, (state.slow, *slower), "none")
        slow_state, emitted = state.slow, []
        for piece in pieces:  # one, unless the context is cut short inside a tick of the fast level
            moved, out = slow.step(slow_state, piece, slower)
            emitted.append(out)
            if whole or slow.due:
                slow_state = moved
        if reset and (whole or slow.due):
            fresh = _restart(fast, fast_state, (slow_state, *slower))
            fast_state = _where(slow.due(slow_state), fresh, fast_state) if slow.due else fresh
        return Nested(slow_state, fast_state), emitted[0] if len(emitted) == 1 else _Pieces(emitted)

    def restart(state, slower):
        slow_state = _restart(slow, state.slow, slower)
        return Nested(slow_state, _restart(fast, state.fast, (slow_state, *slower)) if reset else state.fast)

    # `due` of a nest whose slow level does not count is never evaluated: a period cut short cannot have ended.
    slow_due = slow.due
    due = (lambda state: slow_due(state.slow)) if slow_due else (lambda state: jnp.asarray(False))
    name = f"{fast.name} in {slow.name}"
    return Level(
        *(init, step, slow.period, name, due, restart),
        parts=(fast, slow, reset),
        tokens=slow.tokens,
        first_order=fast.first_order or slow.first_order,
    )


def run(
    level: Level, state: PyTree | None, stream: PyTree, *, slower: Slower = (), checkpoint: Checkpoint = "none"
) -> tuple[PyTree, PyTree]:
    """Let `level` read a stream of data points, by `lax.scan` over its periods.

    Args:
        level: what reads.
        state: where to start; None for `level.init(slower)`.
        stream: pytree of arrays with one leading axis, of any length T.
        slower: states of levels slower than this one.
        checkpoint: what the backward pass keeps, see `scan`.

    Returns:
        (state, emitted): what each step emitted, stacked. Where T is not a multiple of the period, emitted is a tuple of
        pieces in the order of time: the whole periods', stacked, if there are any, then the remainder's. A level without
        `due` does not learn from a remainder of its period: a warning says how many data points are lost to it.

    Raises:
        UserError: an empty stream, leaves of different lengths, more segments than steps, a step that changes the state's
            structure, or a leaf's shape or type.

    Source: NL Def. 2-4.

    >>> total = Level(lambda slower: jnp.zeros(()), lambda state, x, slower: (state + x.sum(), state), period=2)
    >>> with warnings.catch_warnings(action="ignore"):  # the fifth data point is no whole period
    ...     state, (whole, rest) = run(total, None, jnp.ones(5))
    >>> float(state), whole.tolist(), rest.tolist()
    (4.0, [0.0, 2.0], 4.0)
    """
    _assert_level("run: level", level)
    if state is None:
        state = level.init(slower)
    length = stream_length(stream)
    for part in _without_due(level):
        if lost := length % part.period:
            warnings.warn(
                f"run: level {part.name!r} of period {part.period} has no `due` and does not learn from the last {lost} of "
                f"{length} data points, which are lost if the stream goes on: give a multiple of {part.period}, or a `due`",
                stacklevel=2,
            )
    state, pieces = _advance(level, state, stream, slower, checkpoint)
    if length % level.period == 0:
        return state, pieces[0]
    whole = length // level.period > 0
    return state, tuple(pieces[:whole]) + tuple(jax.tree.map(lambda x: x[0], piece) for piece in pieces[whole:])


def _assert_level(thing: str, level: Level) -> None:
    if not isinstance(level, Level):
        raise UserError(f"{thing} {shown(level)}: give a Level")


def _without_due(level: Level) -> list[Level]:
    """The levels of a nest that a context cut short leaves as they were, fastest first."""
    if level.parts:
        return _without_due(level.parts[0]) + _without_due(level.parts[1])
    return [] if level.due else [level]


class _Pieces(list):
    """What a step on a context cut short emits, where its faster level's last tick was cut short too."""


def _advance(level, state, stream, slower, checkpoint):
    """Steps over the whole periods, then over what remains. Returns the state and the emitted pieces, each stacked."""
    length = stream_length(stream)
    steps, rest = divmod(length, level.period)
    pieces = []
    if steps:
        ticks = jax.tree.map(lambda x: x[: steps * level.period].reshape(steps, level.period, *x.shape[1:]), stream)
        step = lambda s, chunk: level.step(s, chunk, slower)
        state, emitted = scan(step, state, ticks, checkpoint=checkpoint, name=f"level {level.name!r}")
        pieces.append(emitted)
    if rest:
        moved, emitted = level.step(state, jax.tree.map(lambda x: x[length - rest :], stream), slower)
        state = moved if level.due else state
        emitted = emitted if isinstance(emitted, _Pieces) else [emitted]
        pieces += [jax.tree.map(lambda x: x[None], piece) for piece in emitted]
    return state, pieces


def _restart(level: Level, state: PyTree, slower: Slower) -> PyTree:
    return level.restart(state, slower) if level.restart else level.init(slower)


def _where(due: Array, fresh: PyTree, state: PyTree) -> PyTree:
    """`fresh` where due; a `due` with axes (one flag a sequence) is of the leading axes of every leaf."""
    return jax.tree.map(lambda a, b: jnp.where(due.reshape(due.shape + (1,) * (b.ndim - due.ndim)), a, b), fresh, state)
