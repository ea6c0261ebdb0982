"""Layers around a memory that learns while reading, and the chunk grid on which they read pieces of any length.

A memory's chunks count from the start of its document, never from the start of a call, so that any split of the input
gives the same result. A piece that starts on the grid is cut into chunks; any other is laid on the grid, with empty slots
before and after it, in static shapes.
"""

from __future__ import annotations

import abc
import dataclasses
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.export import is_symbolic_dim

from nested_jax.checks import Count, check_fields
from nested_jax.errors import UserError, shown
from nested_jax.level import Level, run
from nested_jax.memory.kernels import kernel_of
from nested_jax.memory.layer import LayerState
from nested_jax.memory.passing import read_passing
from nested_jax.numerics import TOKENS, devices_along, rms_norm, shifted, tpu_kind, vary
from nested_jax.remat import Checkpoint, fit_checkpoint
from nested_jax.typing import Array, Bool, Float, Int, Position, PyTree

if TYPE_CHECKING:
    from nested_jax.memory.pallas.form import Form

CONVOLUTION = 4  # taps W of the causal depthwise convolution


class Chunk(NamedTuple):
    """One data point of a memory's level: C tokens of every row. As a context it has a leading axis of chunks."""

    tokens: PyTree  # (B, H, C, ...)
    mask: Bool[Array, "*chunks C"] | None  # False: an empty slot; None: there are none
    reset: Bool[Array, "*chunks B"] | None  # whether the chunk's first token starts a document


class Snapshots(NamedTuple):
    """How a level's state goes without copies of weights, and gets them back, at a boundary where both are equal."""

    drop: Callable[[PyTree], PyTree] = lambda state: state
    take: Callable[[PyTree], PyTree] = lambda state: state


NO_SNAPSHOTS = Snapshots()


@dataclass(frozen=True)
class MemoryLayer(abc.ABC):
    """A `SequenceLayer` around a memory: short convolution, projections, the memory's level over chunks, output map.

    A subclass has `project`, from tokens to what its level reads, and `level`.

    Args:
        width: model width D.
        heads: H; the width per head is K = D / H.
        chunk: tokens C of one parallel product; where a memory's errors are taken at boundaries, tokens between two.
        checkpoint: what the backward pass keeps, in chunks, see `nested_jax.meta.unroll`.
        implementation: of whole chunks: "xla"; "pallas", by kernels where there are any, which run slowly where there is no
            TPU; "auto", by kernels on TPUs, see `kernels`. Values and derivatives are the same; second ones, and forward
            mode, are XLA's.

    Raises UserError for options of another type or out of range, and for a width that is no multiple of the heads.
    """

    width: Count
    heads: Count
    chunk: Count = field(default=64, kw_only=True)
    checkpoint: Checkpoint = field(default="full", kw_only=True)
    implementation: Literal["auto", "xla", "pallas"] = field(default="auto", kw_only=True)
    snapshots: ClassVar[Snapshots] = NO_SNAPSHOTS
    memory_state: ClassVar[type | tuple[type, ...]] = object  # of the level, for errors

    def __post_init__(self):
        check_fields(self, f"{type(self).__name__}: ")
        if self.width % self.heads:
            name = type(self).__name__
            raise UserError(f"{name}: width {self.width} is not a multiple of heads {self.heads}: change one")

    @abc.abstractmethod
    def init_weights(self, key: Array) -> dict[str, PyTree]:
        """As of `SequenceLayer`; "start" is the memory's initial state."""

    @abc.abstractmethod
    def project(self, weights: PyTree, x: Float[Array, "B T D"]) -> PyTree:
        """What the level reads: a tuple of arrays (B, T, H, ...)."""

    def form(self, dtype: jnp.dtype) -> Form | str:
        """How kernels read the memory, whose products are of tokens of that type; or why they do not, in words."""
        return f"no kernel of {type(self).__name__}"

    @abc.abstractmethod
    def level(self, weights: PyTree, batch_size: int) -> Level:
        """The memory: reads `Chunk`s of `chunk` tokens, emits (B, H, C, K)."""

    def init_state(self, weights: PyTree, batch_size: int, max_length: int | None = None) -> LayerState:
        """Fast state at the starts: a differentiable function of the weights."""
        check_sizes(type(self).__name__, batch_size, max_length)
        recent = jnp.zeros((batch_size, CONVOLUTION - 1, self.width), weights["taps"].dtype)
        return LayerState(self.level(weights, batch_size).init(()), recent)

    def __call__(
        self,
        weights: PyTree,
        state: LayerState,
        x: Float[Array, "B T D"],
        position: Position,
        *,
        reset: Bool[Array, "B T"] | None = None,
        aligned: bool = False,
    ) -> tuple[LayerState, Float[Array, "B T D"]]:
        """Reads T more tokens, see `SequenceLayer`."""
        name = type(self).__name__
        check_call(name, (LayerState, self.memory_state), weights, state, position)
        check_tokens(name, (state.recent.shape[0], self.width), x, reset)
        state = vary(state, x, weights, reset, rank=1)
        level, form = self.level(weights, x.shape[0]), None
        if self.implementation == "pallas" or (self.implementation == "auto" and tpu_kind()):
            form = kernel_of(self, x.shape, x.dtype)
        check_documents(name, level.period * level.tokens, position, reset)
        recent, x = convolve(weights["taps"], state.recent, x, reset)
        tokens = self.project(weights, x)
        memory, y = read_stream(
            level, state.memory, tokens, position,
            reset=reset, aligned=aligned, checkpoint=self.checkpoint, snapshots=self.snapshots, remade=(self.level, weights),
            form=None if isinstance(form, str) else form,
        )  # fmt: skip
        return LayerState(memory, recent), project_out(weights, y, x.dtype)

    def levels(self, weights: PyTree, batch_size: int) -> tuple[Level, ...]:
        """What learns in it."""
        return (self.level(weights, batch_size),)


def bounded(position: Position | Int[Array, "*batch"], period: int) -> Any:
    """A position that does not run out: from 1.5 * 2^30 on it is less by a multiple of the period, and never 0 again.

    Args:
        position: tokens read so far, up to the largest int32.
        period: up to 2^30; only the place in a period counts, and whether anything was read.

    >>> bounded(5, 12), bounded(2**31 - 5, 12) < 2**30, (2**31 - 5 - bounded(2**31 - 5, 12)) % 12
    (5, True, 0)
    """
    far, less = 3 * 2**29, 2**30 // period * period
    if isinstance(position, jax.Array):
        return jnp.where(position < far, position, position - less)
    return position if position < far else position - less


def check_size(thing: str, value: Any) -> None:
    """Raises UserError for what is no whole number of at least 1, nor a symbolic size of `jax.export`.

    >>> check_size("batch_size", 0)
    Traceback (most recent call last):
    nested_jax.errors.UserError: batch_size 0: give a whole number of at least 1
    """
    if is_symbolic_dim(value):
        return
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < 1:
        raise UserError(f"{thing} {shown(value)}: give a whole number of at least 1")


def check_sizes(name: str, batch_size: int, max_length: int | None) -> None:
    """Raises UserError for sizes that no state can have."""
    check_size(f"{name}: batch_size", batch_size)
    if max_length is not None:
        check_size(f"{name}: max_length", max_length)


def check_call(name: str, states: tuple, weights: PyTree, state: PyTree, position: Position) -> None:
    """Raises UserError for weights, a state or a position that are none of a layer's.

    Args:
        states: the classes of the state and of its memory.
    """
    if not isinstance(weights, Mapping) or "out" not in weights:
        raise UserError(f"{name}: weights {shown(weights)}: give those of its init_weights")
    if not isinstance(state, states[0]) or not isinstance(getattr(state, "memory", None), states[1]):
        what = type(getattr(state, "memory", state)).__name__
        raise UserError(f"{name}: the state is a {what}: give this layer's init_state(...), or the state of the call before")
    if not isinstance(position, jax.Array) and not (isinstance(position, numbers.Integral) and position >= 0):
        raise UserError(f"{name}: position {shown(position)}: give the tokens that the state has read, from 0")


def check_tokens(name: str, size: tuple[int, int], x: Array, reset: Array | None) -> None:
    """Raises UserError for tokens, or starts of documents, that a layer of this size (B, D) cannot read."""
    if not hasattr(x, "dtype"):
        raise UserError(f"{name}: x {shown(x)}: give an array of floats (B, T, {size[1]})")
    (rows, width), shape = size, list(x.shape)
    if x.ndim != 3 or x.shape[2] != width or not x.size or not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"{name}: x is {x.dtype}{shape}: give floats (B, T, {width}), at least one token")
    check_rows(name, rows, x.shape[:2], reset)


def check_rows(name: str, rows: int, shape: tuple[int, ...], reset: Array | np.ndarray | None) -> None:
    """Raises UserError for tokens of a shape (B, T), or starts of documents, that do not fit a state's rows."""
    if shape[0] != rows:
        raise UserError(f"{name}: {shape[0]} rows of tokens, {rows} of the state: give init_state batch_size={shape[0]}")
    if reset is not None and not hasattr(reset, "dtype"):
        raise UserError(f"{name}: reset {shown(reset)}: give an array of bools {list(shape)}")
    if reset is not None and (reset.shape != shape or reset.dtype != bool):
        raise UserError(f"{name}: reset is {reset.dtype}{list(reset.shape)}: give bools {list(shape)}")


def check_documents(name: str, grid: int, position: Position, reset: Array | np.ndarray | None) -> None:
    """Raises UserError for a document that starts off the grid, where positions and starts are known."""
    if reset is None or isinstance(reset, Tracer) or isinstance(position, jax.Array):
        return
    at = int(position) + np.arange(reset.shape[1])
    if (wrong := at[(np.asarray(reset) & (at % grid != 0)).any(axis=0)]).size:
        raise UserError(f"{name}: reset at token {wrong[0]}: give documents that start on multiples of {grid} tokens")


def read_stream(
    level: Level,
    state: PyTree,
    tokens: PyTree,
    position: Position,
    *,
    reset: Bool[Array, "B T"] | None = None,
    aligned: bool = False,
    checkpoint: Checkpoint = "full",
    snapshots: Snapshots = NO_SNAPSHOTS,
    remade: tuple[Callable[[PyTree, int], Level], PyTree] | None = None,
    form: Form | None = None,
) -> tuple[PyTree, Float[Array, "B T H V"]]:
    """Lets a memory's level read T more tokens, wherever the last piece ended.

    Args:
        level: reads `Chunk`s, counts its own tokens, and emits (B, H, C, V) a chunk.
        state: of the level.
        tokens: pytree of (B, T, H, ...).
        position: tokens read before this piece.
        reset: starts of documents, on the grid: such a row restarts from the level's start.
        aligned: the piece starts on the grid, though its position does not say so while tracing.
        checkpoint: what the backward pass keeps, in periods of the level, see `nested_jax.remat.scan`.
        remade: (weights, B) -> the level of B rows, and the weights: where devices share the stream. None: they do not.
        form: how kernels read whole periods of it, with `remade`; None: XLA compiles all.
        snapshots: of the level's state; the scan over whole periods carries none, so that its backward pass keeps none.

    Returns:
        (state, outputs).
    """
    (B, length), C, period = jax.tree.leaves(tokens)[0].shape[:2], level.tokens, level.period * level.tokens
    known = not isinstance(position, jax.Array)
    if not (aligned or length == 1 or (known and position % period == 0)):
        return _read_off_grid(level, state, tokens, position, reset, checkpoint)

    def chunks(stream, size):
        tokens, reset = stream
        part = jax.tree.map(lambda x: _to_chunks(x, size), tokens)
        return Chunk(part, None, None if reset is None else reset[:, ::size].T)

    def read_periods(level, state, stream):
        restarting = _restarting(level, stream[1], snapshots.drop)
        keep = fit_checkpoint(checkpoint, jax.tree.leaves(stream)[0].shape[1] // period)
        state, y = run(restarting, state, chunks(stream, C), checkpoint=keep)
        return state, _from_chunks(y)

    whole, full, outputs = length - length % period, length - length % C, []
    part = lambda begin, end: jax.tree.map(lambda x: x[:, begin:end], (tokens, reset))
    if whole:
        state, stream = snapshots.drop(state), part(0, whole)
        if remade is not None and devices_along(TOKENS, whole // period) > 1:
            make, weights = remade
            of_rows = lambda weights, rows: partial(read_periods, make(weights, rows))
            state, y = read_passing(of_rows, weights, state, stream)
        elif remade is not None and form is not None:
            from nested_jax.memory.pallas.stream import read  # Pallas is imported where it is used

            make, weights = remade
            twin = lambda weights, state, stream: read_periods(make(weights, B), state, stream)
            state, y = read(form, twin, weights, state, stream)
        else:
            state, y = read_periods(level, state, stream)
        state = snapshots.take(state)
        outputs.append(y)
    for begin, end in ((whole, full), (full, length)):  # whole chunks of a longer period, then what remains of a chunk
        if begin < end:
            rest = chunks(part(begin, end), min(C, end - begin))
            state, y = _restarting(level, reset).step(state, rest, ())
            outputs.append(_from_chunks(y))
    return state, outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _read_off_grid(level, state, tokens, position, reset, checkpoint):
    """A piece laid on the grid at its place in a period, empty slots around it."""
    B, length = jax.tree.leaves(tokens)[0].shape[:2]
    C, period = level.tokens, level.period * level.tokens
    offset = position % period
    slots = -(-(length + period - 1) // period) * period

    def lay(x):
        return jax.lax.dynamic_update_slice_in_dim(jnp.zeros((B, slots, *x.shape[2:]), x.dtype), x, offset, axis=1)

    at = jnp.arange(slots)
    mask = ((at >= offset) & (at < offset + length)).reshape(-1, C)
    part = jax.tree.map(lambda x: _to_chunks(lay(x), C), tokens)
    laid = Chunk(part, mask, None if reset is None else lay(reset)[:, ::C].T)
    state, y = run(_restarting(level, reset), state, laid, checkpoint=fit_checkpoint(checkpoint, slots // period))
    return state, jax.lax.dynamic_slice_in_dim(_from_chunks(y), offset, length, axis=1)


def _to_chunks(x: Float[Array, "B T H ..."], size: int) -> Float[Array, "chunks B H C ..."]:
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1).swapaxes(2, 3)


def _from_chunks(y: Float[Array, "... B H C V"]) -> Float[Array, "B T H V"]:
    y = y.reshape(-1, *y.shape[-4:]).swapaxes(2, 3).swapaxes(0, 1)
    return y.reshape(y.shape[0], -1, *y.shape[3:])


def _restarting(level: Level, reset: Array | None, form: Callable = lambda state: state) -> Level:
    """The level, restarted in the rows in which a context's first token starts a document."""
    if reset is None:
        return level
    fresh = form(level.init(()))

    def step(state, context, slower):
        return level.step(where_rows(context.reset[0], fresh, state), context, slower)

    return dataclasses.replace(level, step=step)


def where_rows(rows: Bool[Array, " B"], fresh: PyTree, state: PyTree) -> PyTree:
    """`fresh` in some rows of the batch. Leaves of a memory's state are (B, ...); scalars are the batch's."""

    def choose(new, old):
        return old if old.ndim == 0 else jnp.where(rows.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, fresh, state)


@partial(jax.checkpoint, static_argnums=2)  # the backward pass keeps the memory's output, not its normalised copy too
def project_out(weights: PyTree, y: Float[Array, "B T H K"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
    """RMS norm of every head, then the output map."""
    y = rms_norm(weights["norm"], y)
    return y.reshape(*y.shape[:2], -1).astype(dtype) @ weights["out"].astype(dtype)


@jax.checkpoint
def convolve(
    taps: Float[Array, "W D"],
    recent: Float[Array, "B W-1 D"],
    x: Float[Array, "B T D"],
    reset: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B W-1 D"], Float[Array, "B T D"]]:
    """Causal depthwise convolution that continues from the last inputs and does not look across a document's start.

    The backward pass keeps its inputs alone.

    Returns:
        (the last W - 1 inputs, outputs).
    """
    length, before = x.shape[1], taps.shape[0] - 1
    document = None if reset is None else jnp.cumsum(reset, axis=1)
    total = jnp.zeros_like(x)
    for tap in range(before + 1):
        by = min(before - tap, length)  # XLA's partitioner pads wrongly by more than there is
        earlier = shifted(recent.astype(x.dtype), 1, -tap, length - before + tap) + shifted(x, 1, by, -by)
        if document is not None and by:
            earlier = jnp.where((shifted(document, 1, by, -by) == document)[..., None], earlier, 0)
        total += taps[tap].astype(x.dtype)[None, None] * earlier
    last = lambda old, new: jnp.concatenate([old[:, length:], new[:, max(0, length - before) :]], axis=1)
    after = last(recent, x.astype(recent.dtype))
    if document is not None:
        own = last(jnp.zeros(recent.shape[:2], document.dtype), document) == document[:, -1:]
        after = jnp.where(own[..., None], after, 0)
    return after, total
