"""Titans: one deep memory a head, with fixed projections of its keys, values, queries and gates."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.level import Level
from nested_jax.memory.deep import (
    Deep,
    Rule,
    Strengths,
    begin,
    count,
    deep_start,
    described,
    in_batch,
    learn,
    local_surprise,
    look,
    loose,
    memory_level,
    one_memory,
    tight,
)
from nested_jax.memory.projections import heads_first, init_projections, project_in, project_out, time_first
from nested_jax.memory.stream import CONVOLUTION, StreamState, advance, read_stream
from nested_jax.numerics import l2norm
from nested_jax.remat import Checkpoint
from nested_jax.typing import Array, Float, PyTree


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
        checkpoint: what the backward pass keeps, in chunks, see `nested_jax.meta.unroll`.
    """

    width: int
    heads: int
    hidden: int
    chunk: int = 64
    momentum: bool = True
    max_rate: float | None = None
    rule: Rule = Rule(erase="none")
    checkpoint: Checkpoint = "full"

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
        memory, y = read_stream(
            self._level(weights, len(x)), state.memory, (*tokens, *gates),
            position=state.position, aligned=aligned, reset=reset, checkpoint=self.checkpoint, tight=tight, loose=loose,
        )  # fmt: skip
        return StreamState(memory, window, advance(state.position, x.shape[1])), project_out(weights, y, x.dtype)

    def levels(self, weights: PyTree, batch: int) -> tuple[Level, ...]:
        """What learns in it."""
        return (self._level(weights, batch),)

    def _level(self, weights: PyTree, batch: int) -> Level:
        starts = Deep(**weights["start"])
        start = in_batch(starts, batch)

        def act(running, snapshot, chunk, slower):
            q, k, v, *gates = (heads_first(part) for part in chunk.tokens)
            strengths = Strengths(self.largest_rate * gates[0], gates[1], gates[2] if self.momentum else None)
            keys, targets = look(snapshot, k), l2norm(v)[:, :, None]
            running, y = learn(running, snapshot, start, keys, targets, strengths, self.rule, chunk.mask, q)
            return running, time_first(y), count(chunk)

        says = described(
            self.rule, self.momentum, "1/2 |M(k) - v|^2", "keys and values of tokens",
            "direct parametric conditioning: slow weights make keys, values and gates",
        )  # fmt: skip
        init = lambda slower: begin(starts, batch, self.momentum)
        return memory_level(init, act, self.chunk, "deep memory", says)


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
