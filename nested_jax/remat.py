"""Scans that keep few of their states for the backward pass, and compute the others again."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from nested_jax.checks import Count
from nested_jax.errors import UserError, is_whole
from nested_jax.numerics import KEPT, vary
from nested_jax.typing import Array, PyTree

LOOP = "loop"
"""Name of the states before steps, and of what they emit, in a scan that keeps those states alone ("full")."""
Checkpoint = Literal["none", "full", "sqrt", "log"] | Count | tuple[Count, ...]


def scan(
    step: Callable,
    state: PyTree,
    xs: PyTree,
    length: int | None = None,
    *,
    checkpoint: Checkpoint = "none",
    offload: bool = False,
    name: str = "scan",
) -> tuple[PyTree, PyTree]:
    """`lax.scan` with one knob for what its backward pass keeps; the rest it computes again.

    Args:
        length: the number of steps, needed where xs has no arrays.
        checkpoint: "none": all that happens inside the steps. "full": the state before each step, and what bears the name
            `numerics.KEPT`; a `jax.checkpoint` around the scan that keeps `LOOP` too runs it no second time. A number n: the
            state before each of at most n segments, and what happens inside one of them. "sqrt": that with about sqrt(T)
            segments. A tuple of numbers: segments in segments, outermost first. "log": quarters in quarters, down to a few
            steps.
        offload: keep the states before segments in the host's memory, where the backend has one ("pinned_host").
        name: of what runs it, in errors.

    Inside `jax.shard_map` a state that is the same on all devices is cast to vary over them where a step makes it vary.

    Raises:
        UserError: a checkpoint that is none of these, more segments than steps, or none to offload; a step that does not
            return (state, y), or another state than it was given.
    """
    length = stream_length(xs, length)
    counts = segments_of(checkpoint, length, offload)
    try:
        if checkpoint == "full":
            return _scan_full(step, state, xs, length)
        if not counts:
            return jax.lax.scan(step, state, xs, length)
        size = -(-length // counts[0])
        if len(counts) == 1 and length % size == 0:
            return _scan_even(step, size, offload, state, xs, length)
        leaves, structure = jax.tree.flatten(xs)
        leaves = [jnp.asarray(x) for x in leaves]
        take = lambda state, at: step(state, structure.unflatten(map(_read, leaves, [at[0]] * len(leaves), at[1])))
        segmented = _scan_segments if len(counts) == 1 else _scan_layers
        return segmented(take, counts, offload, state, list(map(_slot, leaves)), length)
    except TypeError:
        varied = _varied(step, state, xs)
        if varied is None:
            _assert_steady(name, step, state, xs)
            raise
    return scan(step, varied, xs, length, checkpoint=checkpoint, offload=offload, name=name)


def _scan_full(step, state, xs, length):
    """Keeps the state before each step; it and what steps emit bear the name `LOOP`."""
    again = jax.checkpoint(step, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
    named = partial(jax.tree.map, partial(checkpoint_name, name=LOOP))
    state, emitted = jax.lax.scan(lambda state, x: again(named(state), x), state, xs, length)
    return state, named(emitted)


def _scan_even(step, size, offload, state, xs, length):
    """One layer of segments that share the steps evenly, so that xs is split without a copy."""
    parts = jax.tree.map(lambda x: x.reshape(length // size, size, *x.shape[1:]), xs)
    segment = lambda state, part: jax.lax.scan(step, state, part, size)
    state, emitted = jax.lax.scan(_recomputed(segment, offload, 1), state, parts, length // size)
    return state, jax.tree.map(lambda y: y.reshape(length, *y.shape[2:]), emitted)


def _scan_segments(take, counts, offload, state, slots, length):
    """One layer of segments of one length, and the shorter rest."""
    size = -(-length // counts[0])
    whole = length // size
    even = whole * size

    def segment(state, piece):
        begin, slots = piece
        steps = begin + jnp.arange(size)
        return jax.lax.scan(take, state, (steps, slots))

    parts = jax.tree.map(lambda x: x[:even].reshape(whole, size, *x.shape[1:]), slots)
    state, emitted = jax.lax.scan(_recomputed(segment, offload, 1), state, (size * jnp.arange(whole), parts))
    emitted = jax.tree.map(lambda y: y.reshape(even, *y.shape[2:]), emitted)
    # Its backward pass comes first, while no other segment is computed again, so it is not recomputed itself.
    rest = jnp.arange(even, length), jax.tree.map(lambda x: x[even:], slots)
    state, remaining = jax.lax.scan(take, state, rest)
    return state, jax.tree.map(lambda *each: jnp.concatenate(each), emitted, remaining)


def _scan_layers(take, counts, offload, state, slots, length):
    """Segments in segments, of one shape in each layer, so that the step is compiled at most twice whatever the length.

    Where the innermost segments do not share the steps evenly, the first ones take one step more, behind a condition.
    """
    innermost = math.prod(counts)
    size, rest = divmod(length, innermost)
    long = rest * (size + 1)
    layered = lambda x: x.reshape(*counts, *x.shape[1:])

    def split(x):
        """Rows of the steps that all innermost segments take, and of the one more that some take, filled up in others."""
        first = x[:long].reshape(rest, size + 1, *x.shape[1:])
        others = x[long:].reshape(innermost - rest, size, *x.shape[1:])
        return jnp.concatenate([first[:, :size], others]), jnp.concatenate([first[:, size], others[:, 0]])

    def join(every, more):
        first = jnp.concatenate([every[:rest], more[:rest, None]], axis=1)
        return jnp.concatenate([rows.reshape(-1, *rows.shape[2:]) for rows in (first, every[rest:])])

    def segment(state, piece):
        number, slots, slot = piece
        begin = size * number + jnp.minimum(number, rest)
        state, emitted = jax.lax.scan(take, state, (begin + jnp.arange(size), slots))
        if not rest:
            return state, (emitted, None)
        last = jax.tree.map(lambda y: y[-1], emitted)
        state, more = jax.lax.cond(
            number < rest, lambda state, _: take(state, (begin + size, slot)), lambda *same: same, state, last
        )
        return state, (emitted, more)

    for layer in range(1, len(counts) + 1):
        inner = _recomputed(segment, offload, layer)
        segment = lambda state, piece, inner=inner: jax.lax.scan(inner, state, piece)
    if rest:
        pairs = [(None, None) if x is None else split(x) for x in slots]
        slots, extra = [a for a, _ in pairs], [b for _, b in pairs]
    else:
        slots, extra = jax.tree.map(lambda x: x.reshape(innermost, size, *x.shape[1:]), slots), [None] * len(slots)
    pieces = jax.tree.map(layered, (jnp.arange(innermost), slots, extra))
    state, emitted = segment(state, pieces)
    every, more = jax.tree.map(lambda y: y.reshape(innermost, *y.shape[len(counts) :]), emitted)
    if rest:
        return state, jax.tree.map(join, every, more)
    return state, jax.tree.map(lambda y: y.reshape(length, *y.shape[2:]), every)


def _slot(x: Array) -> Array | None:
    """What carries the tangent of a leaf of xs through scans, where it can have one."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else None


def _read(x: Array, i: Array, slot: Array | None) -> Array:
    """x[i], with the tangent of its slot.

    Values come by index from an array that all steps share, so that no segment's part of it is copied. Their tangents go by
    the scans' own inputs, since to the cotangent of a shared array each step would add an array of its whole size.
    """
    at = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False, allow_negative_indices=False)
    return at(x) if slot is None else with_tangent_of(slot, at(jax.lax.stop_gradient(x)))


def with_tangent_of(a: Array, b: Array) -> Array:
    """b with the derivatives of a, of any order, without arithmetic: b may be infinite. Both have one shape and type."""
    return _with_tangent_of.bind(a, b)


# A primitive, since scans drop the rule of a `jax.custom_jvp` where they are differentiated, and so all higher derivatives.
_with_tangent_of = Primitive("with_tangent_of")
_with_tangent_of.def_impl(lambda a, b: b)
_with_tangent_of.def_abstract_eval(lambda a, b: b)
ad.primitive_jvps[_with_tangent_of] = lambda primals, tangents: (with_tangent_of(*primals), tangents[0])
mlir.register_lowering(_with_tangent_of, lambda context, a, b: [b])


def _batched(values, axes):
    size = next(x.shape[axis] for x, axis in zip(values, axes, strict=True) if axis is not None)
    return with_tangent_of(*(batching.bdim_at_front(x, axis, size) for x, axis in zip(values, axes, strict=True))), 0


batching.primitive_batchers[_with_tangent_of] = _batched


def _recomputed(segment: Callable, offload: bool, layer: int) -> Callable:
    return _offloaded(segment, layer) if offload else jax.checkpoint(segment, prevent_cse=False)


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


def fit_checkpoint(checkpoint: Checkpoint, steps: int) -> Checkpoint:
    """A checkpoint for a loop that may be shorter than its segments are many."""
    if isinstance(checkpoint, tuple):
        return checkpoint if math.prod(checkpoint) <= steps else "sqrt"
    return checkpoint if isinstance(checkpoint, str) else min(checkpoint, steps)


def _varied(step: Callable, state: PyTree, xs: PyTree) -> PyTree | None:
    """The state, varying over the mesh axes of `jax.shard_map` over which a step makes it vary; None where it does already.

    A step on what differs between devices may sum over them and keep its state the same on all, so it is asked.
    """
    try:
        after, _ = jax.eval_shape(step, state, jax.tree.map(lambda x: x[0], xs))
        varied = jax.tree.map(vary, state, after)
    except Exception:  # `_assert_steady` reports it
        return None
    return varied if any(map(operator.is_not, jax.tree.leaves(varied), jax.tree.leaves(state))) else None


def _assert_steady(name: str, step: Callable, state: PyTree, xs: PyTree) -> None:
    """Raises UserError where a step does not return its state as it came; nothing where it fails by itself."""
    try:
        after = jax.eval_shape(step, state, jax.tree.map(lambda x: x[0], xs))
    except Exception:
        return
    if not isinstance(after, tuple | list) or len(after) != 2:
        raise UserError(f"{name}: the step returns {jax.tree.structure(after)}: return (state, y)") from None
    assert_same(name, state, after[0])


def assert_same(name: str, before: PyTree, after: PyTree) -> None:
    """Raises UserError for the first leaf of the state that a step makes another."""
    was, now = (jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda s: s, tree)) for tree in (before, after))
    if jax.tree.structure(before) != jax.tree.structure(after):
        odd = sorted({jax.tree_util.keystr(path) for path, _ in was} ^ {jax.tree_util.keystr(path) for path, _ in now})
        what = "" if odd else f", from {jax.tree.structure(before)} to {jax.tree.structure(after)}"
        where = f"state{odd[0] if odd else ''}"
        raise UserError(f"{name}: the step changes the state's structure at {where}{what}: return it as it came") from None
    for (path, a), (_, b) in zip(was, now, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            what = lambda x: f"{x.dtype.name}{list(x.shape)}"
            leaf = f"state{jax.tree_util.keystr(path)}"
            raise UserError(f"{name}: the step changes {leaf} from {what(a)} to {what(b)}: return it as it came") from None


def stream_length(stream: PyTree, length: int | None = None) -> int:
    """T, the leading axis of every leaf, and the length where one is given."""
    if length is not None and not is_whole(length):
        raise UserError(f"length={length!r}: give a whole number of steps from 1")
    try:
        lengths = sorted(set(map(len, jax.tree.leaves(stream))))
    except TypeError:
        raise UserError("a stream has arrays with a leading axis, not numbers: stack them, or give them an axis") from None
    if not lengths and length is not None:
        return length
    if len(lengths) != 1 or lengths[0] == 0:
        raise UserError(f"a stream has leaves of one length of at least 1 along the leading axis, not {lengths}")
    if length not in (None, lengths[0]):
        raise UserError(f"length={length} of a stream of {lengths[0]}: give one of them")
    return lengths[0]
