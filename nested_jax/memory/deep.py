"""Deep memories: two-layer residual MLPs whose both layers learn while reading.

    M(z) = z + W_1 silu(W_2 z)                                            (NL Eq. 89)

Each layer is one linear map of `recurrence`, with its own input: z for W_2 and h = silu(W_2 z) for W_1. Errors are taken
at the last chunk boundary (the snapshot); reads see the exact weights inside the chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.description import Description
from nested_jax.level import Level
from nested_jax.memory.recurrence import Gates, MemoryState, decays, read, write
from nested_jax.memory.stream import Chunk
from nested_jax.numerics import scale, square, upcast
from nested_jax.typing import Array, Bool, Float, PyTree


class Deep(NamedTuple):
    """A two-layer memory: first = W_2 (..., F, K) and second = W_1 (..., K, F), arrays or `MemoryState`s."""

    first: PyTree
    second: PyTree


class Strengths(NamedTuple):
    """Gates of one token before they are split by layer: rate eta, retain alpha, momentum theta or None, (..., C)."""

    rate: Float[Array, "*batch C"]
    retain: Float[Array, "*batch C"]
    momentum: Float[Array, "*batch C"] | None


class LevelState(NamedTuple):
    """State of a deep memory's level.

    running: the memories now; snapshot: their weights at the last boundary (None: now is a boundary); elapsed: tokens
    since then.
    """

    running: Deep
    snapshot: Deep | None
    elapsed: Array


@dataclass(frozen=True)
class Rule:
    """How a deep memory learns; the defaults are those of self-modifying Titans.

    erase: "layer": DGD, each layer erases what it holds at its own input; "none": plain gradient descent.
    step: "proximal": eta' = eta / (1 + eta |x|^2), a contraction for any input; "raw": eta' = eta.
    retention: where decay leads, to zero or to the learned start.
    read: "after" or "before" the token's own write.
    surprise: largest norm of the surprise delta that a token writes into a layer, larger ones are scaled down to it; for the
        second layer that is Huber's objective in place of the square (MIRAS). The default is the largest distance of two
        unit vectors; infinity bounds nothing. Errors are as old as the chunk: on a run of equal keys both layers correct
        the same error in full, and where W_1 is large the memory overshoots by more each time, up to overflow.
    """

    erase: Literal["layer", "none"] = "layer"
    step: Literal["proximal", "raw"] = "proximal"
    retention: Literal["zero", "initial"] = "initial"
    read: Literal["after", "before"] = "after"
    surprise: float = 2.0


class Pass(NamedTuple):
    """One pass of the same inputs through M memories."""

    inputs: Float[Array, "B H C K"]
    before: Float[Array, "B H C MF"]  # W_2 z, of all memories side by side
    hidden: Float[Array, "B H M C F"]  # silu(W_2 z)
    second: Float[Array, "B H M C K"]  # W_1 silu(W_2 z)

    @property
    def output(self) -> Float[Array, "B H M C K"]:
        """M(z)."""
        return _each(self.inputs, self.hidden.shape[2]) + self.second


def look(weights: Deep, z: Float[Array, "B H C K"]) -> Pass:
    """What the memories (B, H, M, ., .) hold at z."""
    before = jnp.matmul(z, jnp.swapaxes(_beside(weights.first), -1, -2))
    hidden = jax.nn.silu(before).reshape(*z.shape[:3], weights.first.shape[2], -1).swapaxes(2, 3)
    return Pass(z, before, hidden, jnp.matmul(hidden, jnp.swapaxes(weights.second, -1, -2)))


def _beside(w: Float[Array, "B H M F K"]) -> Float[Array, "B H MF K"]:
    """Memories that read the same inputs are one map of many outputs."""
    return w.reshape(*w.shape[:2], -1, w.shape[-1])


def _each(x: Float[Array, "B H ..."], memories: int) -> Float[Array, "B H M ..."]:
    """The same for each memory; by copies, since XLA's CPU adds M arrays faster than it reduces over M (the transpose)."""
    return jnp.concatenate([x[:, :, None]] * memories, axis=2)


def bounded(surprise: Float[Array, "*batch V"], largest: float) -> Float[Array, "*batch V"]:
    """The surprise, scaled down to a norm of at most `largest`; infinity bounds nothing.

    >>> print(bounded(jnp.array([[3.0, 4.0], [0.3, 0.4]]), 1.0))
    [[0.6 0.8]
     [0.3 0.4]]
    """
    return scale(jax.lax.rsqrt(jnp.maximum(square(surprise) / largest**2, 1.0)), surprise)


def learn(
    running: Deep,
    snapshot: Deep,
    start: Deep,
    keys: Pass,
    targets: Float[Array, "B H M C K"],
    strengths: Strengths,
    rule: Rule,
    mask: Bool[Array, " C"] | None = None,
    queries: Float[Array, "B H C K"] | None = None,
) -> tuple[Deep, Float[Array, "B H C K"] | None]:
    """One chunk of learning on the objective 1/2 |M(k) - v|^2, and reads of the last memory along the way.

    With momentum the writes have strength eta (1 - theta): S is a running mean of surprises and not their sum, whose steps
    would be 1 / (1 - theta) times as long. So memories stay bounded at any theta.

    Args:
        running: `MemoryState`s now, (B, H, M, ., .).
        snapshot, start: weights at the last boundary, and learned starts, of the same shape.
        keys: what the snapshot holds at the keys, see `look`.

    Returns:
        (running after the chunk, outputs or None).
    """
    B, H, M, C, F = keys.hidden.shape
    boundary = snapshot.first is running.first.weights  # then what the weights hold at the keys is known
    mask = None if mask is None else mask[None, None]
    decay = decays(strengths.retain, strengths.momentum, mask)
    anchor = start if rule.retention == "initial" else Deep(None, None)

    gate = jax.nn.sigmoid(keys.before)
    error = bounded(keys.output - targets, rule.surprise)
    inner_error = jnp.matmul(error, snapshot.second).swapaxes(2, 3).reshape(B, H, C, M * F)
    inner_error *= gate * (1 + keys.before * (1 - gate))
    inner_error = bounded(inner_error.reshape(B, H, C, M, F), rule.surprise).reshape(B, H, C, M * F)

    def gates(inputs, rate, retain, theta):
        if rule.step == "proximal":
            rate = rate / (1 + rate * square(inputs))
        push = rate if theta is None else rate * (1 - theta)
        return Gates(push, rate if rule.erase == "layer" else jnp.zeros_like(rate), retain, theta)

    first = write(
        jax.tree.map(_beside, running.first), keys.inputs, inner_error, gates(keys.inputs, *strengths),
        anchor=None if anchor.first is None else _beside(anchor.first), mask=mask, decay=decay,
        held=keys.before if boundary else None,
    )  # fmt: skip
    each = lambda tree: jax.tree.map(lambda x: _each(x, M), tree)
    second = write(
        running.second, keys.hidden, error, gates(keys.hidden, *each(strengths)), anchor=anchor.second,
        mask=None if mask is None else mask[:, :, None], decay=each(decay), held=keys.second if boundary else None,
    )  # fmt: skip
    after = Deep(jax.tree.map(lambda w: w.reshape(B, H, M, F, -1), first.state), second.state)
    if queries is None:
        return after, None
    first = first._replace(
        before=jax.tree.map(lambda w: w[:, :, -F:], first.before),
        anchor=None if first.anchor is None else first.anchor[:, :, -F:],
        written=first.written[..., -F:],
        erased=first.erased[..., -F:],
    )
    second = jax.tree.map(lambda x: x[:, :, -1], second)
    early = rule.read == "before"
    return after, queries + read(second, jax.nn.silu(read(first, queries, before=early)), before=early)


def weights_of(memory: Deep) -> Deep:
    """The weights of running memories."""
    return Deep(memory.first.weights, memory.second.weights)


def view(state: LevelState) -> Deep:
    """A level's weights at its last boundary: what slower and faster levels see of it."""
    return weights_of(state.running) if state.snapshot is None else state.snapshot


def in_batch(start: Deep, batch: int) -> Deep:
    """The learned starts (H, M, ., .) of every sequence."""
    return jax.tree.map(lambda w: upcast(jnp.broadcast_to(w, (batch, *w.shape))), start)


def begin(start: Deep, batch: int, momentum: bool) -> LevelState:
    """Level state of `batch` sequences at the learned starts (H, M, ., .)."""

    start = in_batch(start, batch)
    zeros = jax.tree.map(jnp.zeros_like, start) if momentum else Deep(None, None)
    running = Deep(MemoryState(start.first, zeros.first), MemoryState(start.second, zeros.second))
    return LevelState(running, weights_of(running), jnp.zeros((), jnp.int32))


def memory_level(init: Callable, act: Callable, period: int, name: str, description: Description) -> Level:
    """A level of deep memories that keeps its snapshot.

    act: (running, snapshot, context, slower) -> (running, emitted, number of tokens that were not empty).
    """

    def step(state, context, slower):
        snapshot = view(state)
        running, emitted, count = act(state.running, snapshot, context, slower)
        elapsed = (state.elapsed + count) % period
        if state.snapshot is not None:
            snapshot = jax.tree.map(lambda new, old: jnp.where(elapsed == 0, new, old), weights_of(running), snapshot)
            return LevelState(running, snapshot, elapsed), emitted
        return LevelState(running, None, elapsed), emitted

    return Level(init, step, period, name, due=lambda state: state.elapsed == 0, description=description)


def described(rule: Rule, momentum: bool, objective: str, context: str, knowledge: str) -> Description:
    """What a level of deep memories says of itself; its momentum is a memory of its own, of surprises."""
    descent = "delta gradient descent" if rule.erase == "layer" else "gradient descent"
    start = "the start" if rule.retention == "initial" else "zero"
    inner = Description(
        objective="-<S, surprise>", rule="gradient descent, decay", context="local surprises", name="momentum",
        knowledge="generation: the memory it writes to makes the surprises",
    )  # fmt: skip
    return Description(objective, f"{descent}, decay to {start}", context, knowledge, inner=(inner,) if momentum else ())


def _is_level(node) -> bool:
    return isinstance(node, LevelState)


def tight(state: PyTree) -> PyTree:
    """Drop the snapshots, at a boundary: they equal the weights, and need not be kept twice for the backward pass."""
    return jax.tree.map(lambda level: level._replace(snapshot=None), state, is_leaf=_is_level)


def loose(state: PyTree) -> PyTree:
    """Take snapshots, at a boundary."""
    return jax.tree.map(lambda level: level._replace(snapshot=weights_of(level.running)), state, is_leaf=_is_level)


def deep_start(key: Array, memories: int, heads: int, width: int, hidden: int) -> dict[str, Array]:
    """Random starts (H, M, ., .); the second layer is small, so that a memory begins near the identity."""
    first, second = jax.random.split(key)
    return {
        "first": jax.random.normal(first, (heads, memories, hidden, width)) * width**-0.5,
        "second": jax.random.normal(second, (heads, memories, width, hidden)) * 0.5 * hidden**-0.5,
    }


def count(chunk: Chunk) -> int | Array:
    """Tokens of a chunk that are not empty slots."""
    return jax.tree.leaves(chunk.tokens)[0].shape[0] if chunk.mask is None else chunk.mask.sum(dtype=jnp.int32)


def one_memory(w: PyTree, z: Float[Array, " K"], pushed: PyTree | None = None) -> Float[Array, " K"]:
    """M(z) of one memory, for the definitions; `pushed` is added to the outputs of its layers."""
    first, second = (0.0, 0.0) if pushed is None else (pushed["first"], pushed["second"])
    return z + w["second"] @ jax.nn.silu(w["first"] @ z + first) + second


def local_surprise(w: PyTree, key: Float[Array, " K"], target: Float[Array, " K"], largest: float) -> dict:
    """{layer: (its input, its bounded surprise)} of one memory, by `jax.vjp`, for the definitions."""
    inputs = {"first": key, "second": jax.nn.silu(w["first"] @ key)}
    still = {"first": jnp.zeros_like(inputs["second"]), "second": jnp.zeros_like(key)}
    output, pull = jax.vjp(partial(one_memory, w, key), still)
    (surprise,) = pull(bounded(output - target, largest))
    return {part: (z, bounded(surprise[part], largest)) for part, z in inputs.items()}
