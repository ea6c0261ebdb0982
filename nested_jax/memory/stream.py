"""Reading a stream in pieces of any length: the chunk grid, and the short convolution before a memory.

A memory's chunks count from the start of its document, never from the start of a call, so that any split of the input
gives the same result. A piece that starts on the grid is read as it lies; any other is laid on the grid, with empty slots
before and after it, in static shapes.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.level import Level, run
from nested_jax.remat import Checkpoint, within
from nested_jax.typing import Array, Bool, Float, PyTree

CONVOLUTION = 4  # taps of the causal depthwise convolution


class Chunk(NamedTuple):
    """Context of a memory's level: leaves have a leading time axis."""

    tokens: PyTree  # (C, B, ...)
    mask: Bool[Array, " C"] | None  # False: an empty slot; None: all are full
    reset: Bool[Array, "C B"] | None  # True at the first token of a new document


class StreamState(NamedTuple):
    """Fast state of a sequence layer that is built on a memory.

    memory: the state of the memory's level; window: the last inputs of the convolution; position: tokens read so far,
    one number for the whole batch (a NumPy integer where it is known while tracing, as in a fresh state).
    """

    memory: PyTree
    window: Float[Array, "B W D"]
    position: Array | np.int32


def advance(position: Array | np.int32, tokens: int) -> Array | np.int32:
    """The position after some more tokens; stays a NumPy integer if it is one."""
    return position + np.int32(tokens) if isinstance(position, jax.Array) else np.int32(position + tokens)


def read_stream(
    level: Level,
    state: PyTree,
    tokens: PyTree,
    *,
    position: Array | np.int32,
    aligned: bool = False,
    reset: Bool[Array, "B T"] | None = None,
    checkpoint: Checkpoint = "full",
    tight=lambda state: state,
    loose=lambda state: state,
) -> tuple[PyTree, PyTree]:
    """Let a memory's level read T more tokens, wherever the last piece ended.

    Args:
        level: reads `Chunk`s of `period` slots, counts its own tokens, and emits (C, B, ...) per chunk.
        tokens: pytree of (T, B, ...).
        position: tokens read before this piece.
        aligned: the piece starts on the chunk grid, though its position does not say so while tracing.
        reset: starts of documents, on the grid: such a row restarts from the level's start.
        checkpoint: what the backward pass keeps, in chunks, see `nested_jax.level.scan`.
        tight, loose: convert the state to and from a form that holds no more than what whole chunks need.

    Returns:
        (state, outputs), outputs (T, B, ...).
    """
    length = jax.tree.leaves(tokens)[0].shape[0]
    reset = None if reset is None else reset.T
    period = level.period
    starting = lambda form: level if reset is None else _restarting(level, form(level.init(())))
    if aligned or length == 1 or _on_grid(position, period):
        outputs = []
        whole = length - length % period
        if whole:
            chunks = _cut(Chunk(tokens, None, reset), slice(0, whole))
            keep = within(checkpoint, whole // period)
            state, emitted = run(starting(tight), tight(state), chunks, checkpoint=keep)
            state = loose(state)
            outputs.append(jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), emitted))
        if length > whole:
            state, emitted = run(starting(loose), state, _cut(Chunk(tokens, None, reset), slice(whole, length)))
            outputs.extend(emitted)
        return state, jax.tree.map(lambda *pieces: jnp.concatenate(pieces), *outputs)

    offset = position % period
    slots = -(-(length + period - 1) // period) * period
    lay = lambda x: jax.lax.dynamic_update_slice_in_dim(jnp.zeros((slots, *x.shape[1:]), x.dtype), x, offset, axis=0)
    at = jnp.arange(slots)
    laid = Chunk(jax.tree.map(lay, tokens), (at >= offset) & (at < offset + length), jax.tree.map(lay, reset))
    state, emitted = run(starting(loose), state, laid, checkpoint=within(checkpoint, slots // period))
    take = lambda x: jax.lax.dynamic_slice_in_dim(x.reshape(slots, *x.shape[2:]), offset, length, axis=0)
    return state, jax.tree.map(take, emitted)


def _on_grid(position: Array | np.int32, period: int) -> bool:
    """Whether a position is known, while tracing, to be a multiple of the period."""
    return not isinstance(position, jax.Array) and int(position) % period == 0


def _restarting(level: Level, fresh: PyTree) -> Level:
    """The level, started anew where a chunk's first slot starts a document."""

    def step(state, chunk, slower):
        return level.step(where_rows(chunk.reset[0], fresh, state), chunk, slower)

    return dataclasses.replace(level, step=step)


def where_rows(rows: Bool[Array, " B"], fresh: PyTree, state: PyTree) -> PyTree:
    """`fresh` in some rows of the batch. Leaves of a memory's state are (B, ...); scalars are the batch's."""

    def choose(new, old):
        return old if old.ndim == 0 else jnp.where(rows.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, fresh, state)


def _cut(chunk: Chunk, piece: slice) -> Chunk:
    return jax.tree.map(lambda x: x[piece], chunk)


@jax.checkpoint
def convolve(
    taps: Float[Array, "W D"], window: Float[Array, "B W-1 D"], x: Float[Array, "B T D"], reset: Bool[Array, "B T"] | None
) -> tuple[Float[Array, "B W-1 D"], Float[Array, "B T D"]]:
    """Causal depthwise convolution that continues from the last inputs and does not look across a document's start.

    The backward pass keeps its inputs alone.
    """
    length, width = x.shape[1], taps.shape[0]
    padded = jnp.concatenate([window.astype(x.dtype), x], axis=1)
    if reset is not None:
        document = jnp.pad(jnp.cumsum(reset, axis=1), ((0, 0), (width - 1, 0)))
    total = 0
    for tap in range(width):
        shifted = padded[:, tap : tap + length]
        if reset is not None and tap < width - 1:
            same = document[:, tap : tap + length] == document[:, width - 1 :]
            shifted = jnp.where(same[..., None], shifted, 0)
        total += taps[tap].astype(x.dtype)[None, None] * shifted
    window = padded[:, length:].astype(window.dtype)
    if reset is not None:
        window = jnp.where((document[:, length:] == document[:, -1:])[..., None], window, 0)
    return window, total
