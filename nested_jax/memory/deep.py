"""Deep memories: two-layer residual MLPs whose both layers learn while reading, and the Titans layer built on one.

    M(z) = z + W_1 silu(W_2 z)                                            (NL Eq. 89)

Each layer is one linear map of `recurrence`, with its own input: z for W_2 and h = silu(W_2 z) for W_1. Errors are taken
at the last chunk boundary (the snapshot); reads see the exact weights inside the chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.level import Level
from nested_jax.memory.projections import heads_first, init_projections, l2norm, project_in, project_out
from nested_jax.memory.recurrence import Gates, MemoryState, read, upcast, write
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
    """

    erase: Literal["layer", "none"] = "layer"
    step: Literal["proximal", "raw"] = "proximal"
    retention: Literal["zero", "initial"] = "initial"
    read: Literal["after", "before"] = "after"


def apply(weights: Deep, z: Float[Array, "*batch C K"]) -> Float[Array, "*batch C K"]:
    """M(z)."""
    hidden = jax.nn.silu(jnp.matmul(z, jnp.swapaxes(weights.first, -1, -2)))
    return z + jnp.matmul(hidden, jnp.swapaxes(weights.second, -1, -2))


def learn(
    running: Deep,
    snapshot: Deep,
    start: Deep,
    keys: Float[Array, "*batch C K"],
    targets: Float[Array, "*batch C K"],
    strengths: Strengths,
    rule: Rule,
    mask: Bool[Array, "*batch C"] | None = None,
    queries: tuple[slice, Float[Array, "*batch C K"]] | None = None,
) -> tuple[Deep, Float[Array, "*batch C K"] | None]:
    """One chunk of learning on the objective 1/2 |M(k) - v|^2, and reads along the way.

    With momentum the writes have strength eta (1 - theta): S is a running mean of surprises and not their sum, whose steps
    would be 1 / (1 - theta) times as long. So memories stay bounded at any theta.

    Args:
        running, snapshot, start: `MemoryState`s now, weights at the last boundary, learned starts.
        queries: which memories of the leading axis are read, and where; None to read none.

    Returns:
        (running after the chunk, outputs or None).
    """
    before = jnp.matmul(keys, jnp.swapaxes(snapshot.first, -1, -2))
    gate = jax.nn.sigmoid(before)
    hidden = before * gate
    error = keys + jnp.matmul(hidden, jnp.swapaxes(snapshot.second, -1, -2)) - targets
    inner_error = jnp.matmul(error, snapshot.second) * gate * (1 + before * (1 - gate))

    def layer(state, anchor, inputs, errors):
        rate = strengths.rate
        if rule.step == "proximal":
            rate = rate / (1 + rate * jnp.sum(inputs**2, -1))
        theta = strengths.momentum
        push = rate if theta is None else rate * (1 - theta)
        gates = Gates(push, rate if rule.erase == "layer" else jnp.zeros_like(rate), strengths.retain, theta)
        return write(state, inputs, errors, gates, anchor=anchor if rule.retention == "initial" else None, mask=mask)

    first = layer(running.first, start.first, keys, inner_error)
    second = layer(running.second, start.second, hidden, error)
    outputs = None
    if queries is not None:
        which, q = queries
        early = rule.read == "before"
        inner = jax.nn.silu(read(_select(first, which), q, before=early))
        outputs = q + read(_select(second, which), inner, before=early)
    return Deep(first.state, second.state), outputs


def _select(chunk: PyTree, which: slice) -> PyTree:
    """Some memories of the leading axis; what all of them share has length 1 there."""
    return jax.tree.map(lambda x: x if x.shape[0] == 1 else x[which], chunk)


def weights_of(memory: Deep) -> Deep:
    """The weights of running memories."""
    return Deep(memory.first.weights, memory.second.weights)


def view(state: LevelState) -> Deep:
    """A level's weights at its last boundary: what slower and faster levels see of it."""
    return weights_of(state.running) if state.snapshot is None else state.snapshot


def begin(start: Deep, batch: int, momentum: bool) -> LevelState:
    """Level state of `batch` sequences at the learned starts (M, 1, H, ., .)."""

    def memory(weights):
        weights = upcast(jnp.broadcast_to(weights, (weights.shape[0], batch, *weights.shape[2:])))
        return MemoryState(weights, jnp.zeros_like(weights) if momentum else None)

    running = Deep(memory(start.first), memory(start.second))
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
    """Random starts (M, 1, H, ., .); the second layer is small, so that a memory begins near the identity."""
    first, second = jax.random.split(key)
    return {
        "first": jax.random.normal(first, (memories, 1, heads, hidden, width)) * width**-0.5,
        "second": jax.random.normal(second, (memories, 1, heads, width, hidden)) * 0.5 * hidden**-0.5,
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
        start = Deep(**weights["start"])

        def act(running, snapshot, chunk, slower):
            q, k, v, *gates = (heads_first(part) for part in chunk.tokens)
            strengths = Strengths(self.largest_rate * gates[0], gates[1], gates[2] if self.momentum else None)
            mask = None if chunk.mask is None else chunk.mask[None, None, None]
            running, y = learn(running, snapshot, start, k, l2norm(v), strengths, self.rule, mask, (slice(None), q))
            return running, jnp.moveaxis(y[0], 2, 0), count(chunk)

        level = memory_level(None, act, self.chunk, "memory")
        memory, y = read_stream(
            level, state.memory, (*tokens, *gates),
            position=state.position, aligned=aligned or on_grid(state.position, self.chunk),
            reset=reset, fresh=None if reset is None else self.init_state(weights, len(x)).memory, tight=tight, loose=loose,
        )  # fmt: skip
        return StreamState(memory, window, advance(state.position, x.shape[1])), project_out(weights, y, x.dtype)


def definition(layer: Titans, weights: PyTree, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """The same layer for one sequence from its start, token by token: the slow twin, with `jax.grad` for the surprise."""
    window = layer.init_state(weights, 1).window
    _, tokens, gates = project_in(weights, window, x[None], layer.heads, None)
    memory = lambda w, z: z + w["second"] @ jax.nn.silu(w["first"] @ z)
    rule = layer.rule

    def one_head(start, q, k, v, rate, retain, momentum=None):
        def token(carry, now):
            running, snapshot, velocity = carry
            t, q, k, v, eta, alpha, theta = now
            eta, v = layer.largest_rate * eta, l2norm(v)
            renewed = jax.tree.map(lambda new, old: jnp.where(t % layer.chunk == 0, new, old), running, snapshot)
            surprise = jax.grad(lambda w: 0.5 * jnp.sum((memory(w, k) - v) ** 2))(renewed)
            after = {}
            pushes = {}
            for part, z in {"first": k, "second": jax.nn.silu(renewed["first"] @ k)}.items():
                step = eta / (1 + eta * z @ z) if rule.step == "proximal" else eta
                pushes[part] = theta * velocity[part] - (1 - theta) * step * surprise[part]
                erased = step * jnp.outer(running[part] @ z, z) if rule.erase == "layer" else 0.0
                origin = start[part] if rule.retention == "initial" else 0.0
                after[part] = origin + alpha * (running[part] - origin) - erased + pushes[part]
            return (after, renewed, pushes), memory(running if rule.read == "before" else after, q)

        theta = jnp.zeros_like(rate) if momentum is None else momentum
        carry = (start, start, jax.tree.map(jnp.zeros_like, start))
        return jax.lax.scan(token, carry, (jnp.arange(len(q)), q, k, v, rate, retain, theta))[1]

    starts = {part: w[0, 0] for part, w in weights["start"].items()}
    tokens, gates = ([part[:, 0] for part in parts] for parts in (tokens, gates))
    axes = (0,) + (1,) * (len(tokens) + len(gates))
    y = jax.vmap(one_head, in_axes=axes, out_axes=1)(starts, *tokens, *gates)
    return project_out(weights, y[:, None], x.dtype)[0]
