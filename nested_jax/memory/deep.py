"""Deep memories: two-layer residual MLPs whose both layers learn while reading, and the Titans layer built on one.

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
import numpy as np

from nested_jax.level import Level
from nested_jax.memory.projections import heads_first, init_projections, l2norm, project_in, project_out, time_first
from nested_jax.memory.recurrence import Gates, MemoryState, decays, read, scale, square, upcast, write
from nested_jax.memory.stream import CONVOLUTION, Chunk, StreamState, advance, on_grid, read_stream
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


def memory_level(init: Callable, act: Callable, period: int, name: str) -> Level:
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

    return Level(init, step, period, name, due=lambda state: state.elapsed == 0)


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


@dataclass(frozen=True)
class Titans:
    """Titans' deep memory with fixed projections and momentum (Titans Eq. 8-15).

        S_t = theta_t S_{t-1} - eta_t grad 1/2 |M(k_t) - v_t|^2        M_t = alpha_t M_{t-1} + S_t        y_t = M_t(q_t)

    with keys, values and queries of unit norm. The call is (weights, state, x (B, T, D)) -> (state, y (B, T, D)).

    Args:
        width, heads: D and H, K = D / H.
        hidden: hidden width F of the memory.
        chunk: tokens between two refreshes of the errors.
        momentum: writes carry momentum; their strength is then eta (1 - theta), see `learn`.
        max_rate: largest eta; None for 4 / chunk.
        rule: see `Rule`.
    """

    width: int
    heads: int
    hidden: int
    chunk: int = 64
    momentum: bool = True
    max_rate: float | None = None
    rule: Rule = Rule(erase="none")

    @property
    def largest_rate(self) -> float:
        """eta_max: errors are those of the chunk's start, so its steps must not add up to much more than one."""
        return 4 / self.chunk if self.max_rate is None else self.max_rate

    def init_weights(self, key: Array) -> dict[str, PyTree]:
        """Learned parameters, float32; start is the memories' initial state."""
        project, start = jax.random.split(key)
        K = self.width // self.heads
        weights = init_projections(project, self.width, self.heads, gates=3 if self.momentum else 2)
        return {**weights, "start": deep_start(start, 1, self.heads, K, self.hidden)}

    def init_state(self, weights: PyTree, batch: int, max_length: int | None = None) -> StreamState:
        """Fast state at the starts: a differentiable function of the weights."""
        memory = begin(Deep(**weights["start"]), batch, self.momentum)
        window = jnp.zeros((batch, CONVOLUTION - 1, self.width), weights["taps"].dtype)
        return StreamState(memory, window, np.int32(0))

    def __call__(self, weights, state, x, *, reset=None, aligned=False):
        window, tokens, gates = project_in(weights, state.window, x, self.heads, reset)
        start = in_batch(Deep(**weights["start"]), len(x))

        def act(running, snapshot, chunk, slower):
            q, k, v, *gates = (heads_first(part) for part in chunk.tokens)
            strengths = Strengths(self.largest_rate * gates[0], gates[1], gates[2] if self.momentum else None)
            keys, targets = look(snapshot, k), l2norm(v)[:, :, None]
            running, y = learn(running, snapshot, start, keys, targets, strengths, self.rule, chunk.mask, q)
            return running, time_first(y), count(chunk)

        level = memory_level(None, act, self.chunk, "memory")
        memory, y = read_stream(
            level, state.memory, (*tokens, *gates),
            position=state.position, aligned=aligned or on_grid(state.position, self.chunk),
            reset=reset, fresh=None if reset is None else self.init_state(weights, len(x)).memory, tight=tight, loose=loose,
        )  # fmt: skip
        return StreamState(memory, window, advance(state.position, x.shape[1])), project_out(weights, y, x.dtype)


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


def definition(layer: Titans, weights: PyTree, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """The same layer for one sequence from its start, token by token: the slow twin, with `jax.vjp` for the surprise."""
    window = layer.init_state(weights, 1).window
    _, tokens, gates = project_in(weights, window, x[None], layer.heads, None)
    rule = layer.rule

    def one_head(start, q, k, v, rate, retain, momentum=None):
        def token(carry, now):
            running, snapshot, velocity = carry
            t, q, k, v, eta, alpha, theta = now
            eta, v = layer.largest_rate * eta, l2norm(v)
            renewed = jax.tree.map(lambda new, old: jnp.where(t % layer.chunk == 0, new, old), running, snapshot)
            after, pushes = {}, {}
            for part, (z, surprise) in local_surprise(renewed, k, v, rule.surprise).items():
                step = eta / (1 + eta * z @ z) if rule.step == "proximal" else eta
                pushes[part] = theta * velocity[part]
                pushes[part] -= (1 - theta) * step * jnp.outer(surprise, z)
                erased = step * jnp.outer(running[part] @ z, z) if rule.erase == "layer" else 0.0
                origin = start[part] if rule.retention == "initial" else 0.0
                after[part] = origin + alpha * (running[part] - origin) - erased + pushes[part]
            return (after, renewed, pushes), one_memory(running if rule.read == "before" else after, q)

        theta = jnp.zeros_like(rate) if momentum is None else momentum
        carry = (start, start, jax.tree.map(jnp.zeros_like, start))
        return jax.lax.scan(token, carry, (jnp.arange(len(q)), q, k, v, rate, retain, theta))[1]

    starts = {part: w[:, 0] for part, w in weights["start"].items()}
    tokens, gates = ([part[:, 0] for part in parts] for parts in (tokens, gates))
    axes = (0,) + (1,) * (len(tokens) + len(gates))
    y = jax.vmap(one_head, in_axes=axes, out_axes=1)(starts, *tokens, *gates)
    return project_out(weights, y[:, None], x.dtype)[0]
