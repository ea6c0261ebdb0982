"""Scans that keep few of their states for the backward pass, and compute the others again."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nested_jax.checks import Count
from nested_jax.errors import UserError, is_whole
from nested_jax.typing import PyTree

Checkpoint = Literal["none", "full", "sqrt", "log"] | Count | tuple[Count, ...]


def scan(
    step: Callable,
    state: PyTree,
    xs: PyTree,
    *,
    checkpoint: Checkpoint = "none",
    offload: bool = False,
    name: str = "scan",
) -> tuple[PyTree, PyTree]:
    """`lax.scan` with one knob for what its backward pass keeps; the rest it computes again.

    Args:
        checkpoint: "none": all that happens inside the steps. "full": the state before each step. A number n: the state
            before each of n segments, and what happens inside one of them. "sqrt": that with about sqrt(T) segments. A
            tuple of numbers: segments in segments, outermost first. "log": quarters in quarters, down to a few steps.
        offload: keep the states before segments in the host's memory, where the backend has one ("pinned_host").
        name: of what runs it, in errors.

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
        _assert_steady(name, step, state, xs)
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
    for count, steps in ((rest, size + 1), (segments - rest, size)):  # the given number of segments, of nearly equal lengths
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


def fit_checkpoint(checkpoint: Checkpoint, steps: int) -> Checkpoint:
    """A checkpoint for a loop that may be shorter than its segments are many."""
    if isinstance(checkpoint, tuple):
        return checkpoint if math.prod(checkpoint) <= steps else "sqrt"
    return checkpoint if isinstance(checkpoint, str) else min(checkpoint, steps)


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


def stream_length(stream: PyTree) -> int:
    """T, the leading axis of every leaf."""
    try:
        lengths = sorted(set(map(len, jax.tree.leaves(stream))))
    except TypeError:
        raise UserError("a stream has arrays with a leading axis, not numbers: stack them, or give them an axis") from None
    if len(lengths) != 1 or lengths[0] == 0:
        raise UserError(f"a stream has leaves of one length of at least 1 along the leading axis, not {lengths}")
    return lengths[0]
