"""Levels: everything that learns is a pure function (state, context chunk) -> (state, output) with a period.

A `Level` moves once every `period` ticks of its context flow. `nest` puts a fast level inside one step of a slow one;
`run` lets a level read a stream. Attention memories, CMS blocks, optimizers and the training loop are all of this kind
(NL Def. 2-4): they differ in their update frequency and in the context they compress.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name

from nested_jax.errors import UserError, is_whole
from nested_jax.typing import Array, PyTree

Slower = tuple[PyTree, ...]
Checkpoint = Literal["none", "full", "sqrt", "log"] | int | tuple[int, ...]


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
    inner: tuple[Description | optax.GradientTransformation, ...] = ()
    name: str = "memory"


@dataclass(frozen=True)
class Level:
    """One level of a nested system.

    Args:
        init: slower -> state. `slower` is the tuple of the slower levels' states, nearest first.
        step: (state, context, slower) -> (state, emitted). `context` has a leading axis: the tokens of one period, or
            what the faster level emitted over its ticks.
        period: data points (tokens) between two updates; update frequency is 1 / period.
        name: what tables and errors call it.
        due: for a level that counts its own data points, state -> whether its period has just ended. Such a level may
            be given less than a period at a time. Without it, a context cut short leaves the state as it was
            (NL Eq. 71: unchanged unless the period divides the count) and only what `step` emits is used.
        restart: (state, slower) -> state, what `nest(..., reset=True)` does to this level; the default is `init(slower)`.
        description: what it says of itself.
        parts: of a nest, its fast and its slow level, and whether the slow one resets the fast one.
    """

    init: Callable[[Slower], PyTree]
    step: Callable[[PyTree, PyTree, Slower], tuple[PyTree, PyTree]]
    period: int
    name: str = "level"
    due: Callable[[PyTree], Array] | None = None
    restart: Callable[[PyTree, Slower], PyTree] | None = None
    description: Description = Description()
    parts: tuple[Level, Level, bool] | None = None

    def __post_init__(self):
        if not is_whole(self.period):
            raise UserError(
                f"level {self.name!r}: period {self.period!r} is no positive whole number of tokens: give 1 or more"
            )


class Nested(NamedTuple):
    """State of two nested levels."""

    slow: PyTree
    fast: PyTree


def nest(fast: Level, slow: Level, *, reset: bool = False) -> Level:
    """One step of `slow` around `slow.period / fast.period` steps of `fast`, as one level.

    The slow state is visible, read-only, to the fast level (first of its `slower`). What the fast level emits over its
    ticks, stacked, is the slow level's context: a level takes its share and hands the rest on.

    Args:
        reset: restart the fast level from the slow one each time the slow one has stepped (NL Eq. 72; MAML). Levels
            inside `fast` follow the `reset` of their own nest.

    Raises:
        UserError: the periods do not divide one another.

    >>> import jax.numpy as jnp
    >>> mean = Level(lambda slower: jnp.zeros(()), lambda s, x, slower: (s, x.mean() - slower[0]), period=2, name="mean")
    >>> drift = Level(lambda slower: jnp.zeros(()), lambda s, e, slower: (s + e.sum(), e), period=4, name="drift")
    >>> state, emitted = run(nest(mean, drift), None, jnp.arange(8.0))
    >>> float(state.slow), emitted.tolist()
    (8.0, [[0.5, 2.5], [1.5, 3.5]])
    """
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

    # `due` of a nest whose slow level does not count is never asked for: a period cut short cannot have ended.
    due = (lambda state: slow.due(state.slow)) if slow.due else (lambda state: jnp.asarray(False))
    name = f"{fast.name} in {slow.name}"
    return Level(init, step, slow.period, name, due, restart, parts=(fast, slow, reset))


def run(
    level: Level, state: PyTree | None, stream: PyTree, *, slower: Slower = (), checkpoint: Checkpoint = "none"
) -> tuple[PyTree, PyTree]:
    """Let `level` read a stream of data points, by `lax.scan` over its periods.

    Args:
        state: where to start; None for `level.init(slower)`.
        stream: pytree of arrays with one leading axis, of any length T.
        slower: states of levels slower than this one.
        checkpoint: what the backward pass keeps, see `scan`.

    Returns:
        (state, emitted): what each step emitted, stacked. Where T is not a multiple of the period, emitted is a tuple of
        pieces in the order of time: the whole periods', stacked, if there are any, then the remainder's.

    Raises:
        UserError: an empty stream, leaves of different lengths, more segments than steps, a step that changes the state's
            structure, or a leaf's shape or type.
    """
    if state is None:
        state = level.init(slower)
    length = stream_length(stream)
    state, pieces = _advance(level, state, stream, slower, checkpoint)
    if length % level.period == 0:
        return state, pieces[0]
    whole = length // level.period > 0
    return state, tuple(pieces[:whole]) + tuple(jax.tree.map(lambda x: x[0], piece) for piece in pieces[whole:])


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
        state, emitted = scan(step, state, ticks, checkpoint=checkpoint, who=f"level {level.name!r}")
        pieces.append(emitted)
    if rest:
        moved, emitted = level.step(state, jax.tree.map(lambda x: x[length - rest :], stream), slower)
        state = moved if level.due else state
        emitted = emitted if isinstance(emitted, _Pieces) else [emitted]
        pieces += [jax.tree.map(lambda x: x[None], piece) for piece in emitted]
    return state, pieces


def scan(
    step: Callable,
    state: PyTree,
    xs: PyTree,
    *,
    checkpoint: Checkpoint = "none",
    offload: bool = False,
    who: str = "scan",
) -> tuple[PyTree, PyTree]:
    """`lax.scan` with one knob for what its backward pass keeps; the rest it computes again.

    Args:
        checkpoint: "none": all that happens inside the steps. "full": the state before each step. A number n: the state
            before each of n segments, and what happens inside one of them. "sqrt": that with about sqrt(T) segments. A
            tuple of numbers: segments in segments, outermost first. "log": quarters in quarters, down to a few steps.
        offload: keep the states before segments in the host's memory, where the backend has one ("pinned_host").
        who: runs it, in errors.

    Raises:
        UserError: a checkpoint that is none of these, more segments than steps, or none to offload; a step that does not
            return (state, y), or another state than it was given.
    """
    counts = segments_of(checkpoint, stream_length(xs), offload)
    if checkpoint == "full":
        step = jax.checkpoint(step, prevent_cse=False)
    try:
        return _scan_segments(step, counts, offload, state, xs)
    except TypeError:
        _assert_steady(who, step, state, xs)
        raise


def _scan_segments(step, counts: tuple[int, ...], offload: bool, state: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
    length = stream_length(xs)
    if not counts or length == 1:
        return jax.lax.scan(step, state, xs)
    segments = min(counts[0], length)
    size, rest = divmod(length, segments)
    inner = partial(_scan_segments, step, counts[1:], offload)
    inner = _offloaded(inner, len(counts)) if offload else jax.checkpoint(inner, prevent_cse=False)
    pieces, begin = [], 0
    for count, steps in ((rest, size + 1), (segments - rest, size)):  # as many as asked for, as equal as can be
        end = begin + count * steps
        if count:
            part = jax.tree.map(lambda x: x[begin:end].reshape(count, steps, *x.shape[1:]), xs)  # noqa: B023
            state, emitted = jax.lax.scan(inner, state, part)
            pieces.append(jax.tree.map(lambda x: x.reshape(count * steps, *x.shape[2:]), emitted))  # noqa: B023
        begin = end
    return state, jax.tree.map(lambda *each: jnp.concatenate(each) if rest else each[0], *pieces)


def _offloaded(segment: Callable, layer: int) -> Callable:
    """Rematerialised, with its first state in the host's memory; each layer of segments keeps its own."""
    name = f"state before segments, layer {layer}"
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[name],
        offload_src="device",
        offload_dst="pinned_host",
    )
    named = lambda state: jax.tree.map(lambda leaf: checkpoint_name(leaf, name), state)
    return jax.checkpoint(lambda state, xs: segment(named(state), xs), policy=policy, prevent_cse=False)


def segments_of(checkpoint: Checkpoint, length: int, offload: bool = False) -> tuple[int, ...]:
    """The segments in segments that a checkpoint asks for; none for "none" and "full". Raises as `scan` does."""
    if isinstance(checkpoint, str) and checkpoint in ("none", "full"):
        if offload:
            raise UserError(
                f"offload=True keeps states before segments: give checkpoint='sqrt' or a number, not {checkpoint!r}"
            )
        return ()
    if checkpoint == "sqrt":
        return (max(1, math.isqrt(length)),)
    if checkpoint == "log":
        return (4,) * ((length.bit_length() - 1) // 2) or (1,)
    counts = checkpoint if isinstance(checkpoint, tuple) else (checkpoint,)
    if not counts or not all(map(is_whole, counts)) or math.prod(counts) > length:
        raise UserError(
            f"checkpoint={checkpoint!r}: give 'none', 'full', 'sqrt', 'log', a number of segments from 1 to {length}, the "
            "steps, or a tuple of numbers whose product is at most that"
        )
    return counts


def within(checkpoint: Checkpoint, steps: int) -> Checkpoint:
    """A checkpoint for a loop that may be shorter than its segments are many."""
    if isinstance(checkpoint, tuple):
        return checkpoint if math.prod(checkpoint) <= steps else "sqrt"
    return checkpoint if isinstance(checkpoint, str) else min(checkpoint, steps)


def _assert_steady(who: str, step: Callable, state: PyTree, xs: PyTree) -> None:
    """Raises UserError where a step does not return its state as it came; nothing where it fails by itself."""
    try:
        after = jax.eval_shape(step, state, jax.tree.map(lambda x: x[0], xs))
    except Exception:
        return
    if not isinstance(after, tuple | list) or len(after) != 2:
        raise UserError(f"{who}: the step returns {jax.tree.structure(after)}: return (state, y)") from None
    assert_same(who, state, after[0])


def assert_same(who: str, before: PyTree, after: PyTree) -> None:
    """Raises UserError for the first leaf of the state that a step makes another."""
    was, now = (jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda s: s, tree)) for tree in (before, after))
    if jax.tree.structure(before) != jax.tree.structure(after):
        odd = sorted({jax.tree_util.keystr(path) for path, _ in was} ^ {jax.tree_util.keystr(path) for path, _ in now})
        what = "" if odd else f", from {jax.tree.structure(before)} to {jax.tree.structure(after)}"
        where = f"state{odd[0] if odd else ''}"
        raise UserError(f"{who}: the step changes the state's structure at {where}{what}: return it as it came") from None
    for (path, a), (_, b) in zip(was, now, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            what = lambda x: f"{x.dtype.name}{list(x.shape)}"
            leaf = f"state{jax.tree_util.keystr(path)}"
            raise UserError(f"{who}: the step changes {leaf} from {what(a)} to {what(b)}: return it as it came") from None


def _restart(level: Level, state: PyTree, slower: Slower) -> PyTree:
    return level.restart(state, slower) if level.restart else level.init(slower)


def _where(due: Array, fresh: PyTree, state: PyTree) -> PyTree:
    """`fresh` where due; a `due` with axes (one flag a sequence) speaks for the leading axes of every leaf."""
    return jax.tree.map(lambda a, b: jnp.where(due.reshape(due.shape + (1,) * (b.ndim - due.ndim)), a, b), fresh, state)


def stream_length(stream: PyTree) -> int:
    """T, the leading axis of every leaf."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(stream)]
    if () in shapes:
        raise UserError("a stream has arrays with a leading axis, not numbers: stack them, or give them an axis")
    lengths = sorted({shape[0] for shape in shapes})
    if len(lengths) != 1 or lengths[0] == 0:
        raise UserError(f"a stream has leaves of one length of at least 1 along the leading axis, not {lengths}")
    return lengths[0]
