"""The Omega rule: a matrix memory that learns from a window of tokens at once, by any attentional bias (ATLAS).

    M_t = alpha_t M_{t-1} - eta_t sum over i = t-c+1 ... t of gamma_i delta_i phi(k_i)^T          y_t = M_t phi(q_t)

with delta_i the derivative of the objective at M_b phi(k_i), M_b the memory at the last chunk boundary. With c = 1 and
another objective than l2 these are the l_p and Huber memories of MIRAS.

In a chunk, with A the retention from token to token, a that from the chunk's start, D the window's band (1 where token i is
among the last c at t) and N = A diag(eta) D, over the tokens of the window before the chunk and of the chunk,

    Y = diag(a) phi(Q) M^T - (N o phi(Q) phi(K)^T) diag(gamma) Delta
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.description import Description
from nested_jax.level import Level
from nested_jax.memory import objective
from nested_jax.memory.deep import bounded
from nested_jax.memory.projections import heads_first, init_projections, project_in, project_out, time_first
from nested_jax.memory.recurrence import decays
from nested_jax.memory.stream import CONVOLUTION, StreamState, advance, read_stream
from nested_jax.numerics import l2norm, scale
from nested_jax.remat import Checkpoint
from nested_jax.typing import Array, Float, PyTree


class Window(NamedTuple):
    """The last c - 1 tokens, oldest first, which the next ones learn from once more."""

    keys: Float[Array, "B H W K"]  # phi(k)
    values: Float[Array, "B H W V"]
    strengths: Float[Array, "B H W"]  # gamma; 0 where there was no token yet


class OmegaState(NamedTuple):
    """Fast state: the memory now, at the last boundary (None: now is one), the window, and tokens since the boundary."""

    weights: Float[Array, "B H V K"]
    snapshot: Float[Array, "B H V K"] | None
    window: Window
    elapsed: Array


@dataclass(frozen=True)
class OmegaMemory:
    """A matrix per head. The call is (weights, state, x (B, T, D)) -> (state, y (B, T, D)).

    Args:
        width, heads: D and H, V = D / H.
        objective: the attentional bias: l2, lp or huber.
        window: c, tokens that every update learns from.
        features: phi, "identity", or "polynomial" for (k, k^2) entry by entry, of twice the width; of unit norm.
        chunk: tokens between two refreshes of the errors.
        power, threshold: of lp and huber.
        max_rate: largest eta; None for 2 / (chunk + 1). gamma is at most 1 / c, and 1 if c is 1.
        surprise: largest norm of an error, larger ones are scaled down to it: keeps the memory bounded at any rate.
        checkpoint: what the backward pass keeps, in chunks, see `nested_jax.meta.unroll`.

    Source: NL Eq. 68; ATLAS (arXiv 2505.23735) section 3; MIRAS (arXiv 2504.13173) section 5.
    """

    width: int
    heads: int
    objective: Literal["l2", "lp", "huber"] = "l2"
    window: int = 16
    features: Literal["identity", "polynomial"] = "identity"
    chunk: int = 64
    power: float = 3.0
    threshold: float = 1.0
    max_rate: float | None = None
    surprise: float = 2.0
    checkpoint: Checkpoint = "full"

    @property
    def bias(self) -> objective.Objective:
        """The objective, with its option."""
        made = {"l2": objective.l2, "lp": lambda: objective.lp(self.power), "huber": lambda: objective.huber(self.threshold)}
        return made[self.objective]()

    @property
    def largest_rate(self) -> float:
        """eta_max: errors are those of the chunk's start, so that its steps must not add up to 2. Where they do, a run of
        equal keys turns an error around by more than all of it, and outer gradients grow from chunk to chunk."""
        return 2 / (self.chunk + 1) if self.max_rate is None else self.max_rate

    def lift(self, keys: Float[Array, "*batch K"]) -> Float[Array, "*batch phi"]:
        """phi of keys or queries of unit norm."""
        return keys if self.features == "identity" else l2norm(jnp.concatenate([keys, keys**2], axis=-1))

    def init_weights(self, key: Array) -> dict[str, PyTree]:
        """Learned parameters, float32; start is the memories' initial state (H, V, phi)."""
        V = self.width // self.heads
        weights = init_projections(key, self.width, self.heads, gates=2 if self.window == 1 else 3)
        return {**weights, "start": jnp.zeros((self.heads, V, V * (1 if self.features == "identity" else 2)))}

    def init_state(self, weights: PyTree, batch: int, max_length: int | None = None) -> StreamState:
        """Fast state at the starts: a differentiable function of the weights."""
        start = jnp.repeat(weights["start"][None], batch, axis=0)
        _, H, V, K = start.shape
        empty = lambda *shape: jnp.zeros((batch, H, self.window - 1, *shape), start.dtype)
        memory = OmegaState(start, start, Window(empty(K), empty(V), empty()), jnp.zeros((), jnp.int32))
        window = jnp.zeros((batch, CONVOLUTION - 1, self.width), weights["taps"].dtype)
        return StreamState(memory, window, np.int32(0))

    def __call__(self, weights, state, x, *, reset=None, aligned=False):
        window, tokens, gates = project_in(weights, state.window, x, self.heads, reset)
        memory, y = read_stream(
            self._level(weights, len(x)), state.memory, (*tokens, *gates),
            position=state.position, aligned=aligned, reset=reset, checkpoint=self.checkpoint,
            tight=lambda state: state._replace(snapshot=None), loose=lambda state: state._replace(snapshot=state.weights),
        )  # fmt: skip
        return StreamState(memory, window, advance(state.position, x.shape[1])), project_out(weights, y, x.dtype)

    def levels(self, weights: PyTree, batch: int) -> tuple[Level, ...]:
        """What learns in it."""
        return (self._level(weights, batch),)

    def _level(self, weights: PyTree, batch: int) -> Level:
        one = self.bias.name
        description = Description(
            objective=one if self.window == 1 else f"sum over the last {self.window} tokens of gamma ({one})",
            rule="gradient descent, decay",
            context="keys and values of tokens",
            knowledge="direct parametric conditioning: slow weights make keys, values and gates",
        )
        name = f"{self.objective} memory" if self.window == 1 else "omega memory"
        init, due = lambda slower: self.init_state(weights, batch).memory, lambda state: state.elapsed == 0
        return Level(init, self._step, self.chunk, name, due, description=description)

    def _strength(self, rate: Array, gate: Array | None = None) -> Array:
        """gamma; of a window of one token it would only be a factor of the rate."""
        return jnp.ones_like(rate) if gate is None else gate / self.window

    def _step(self, state: OmegaState, chunk, slower):
        q, k, v, rate, retain, *strength = (heads_first(part) for part in chunk.tokens)
        C = k.shape[2]
        full = jnp.ones(C, bool) if chunk.mask is None else chunk.mask
        rate = jnp.where(full[None, None], self.largest_rate * rate, 0.0)
        strength = jnp.where(full[None, None], self._strength(rate, *strength), 0.0)
        snapshot = state.weights if state.snapshot is None else state.snapshot

        join = lambda old, new: jnp.concatenate([old, new], axis=2)
        seen = Window(*map(join, state.window, (self.lift(k), l2norm(v), strength)))
        errors = bounded(self.bias.error(seen.keys @ jnp.swapaxes(snapshot, -1, -2), seen.values), self.surprise)
        pushes = scale(seen.strengths, errors)

        rank = jnp.cumsum(full)  # of every token in the order of time, those of the window at 0, -1, ...
        age = rank[:, None] - jnp.concatenate([jnp.arange(2 - self.window, 1), rank])[None]
        band = ((age >= 0) & (age < self.window)).astype(k.dtype)
        retained, _, retention, *_ = decays(retain, mask=full[None, None])
        weigh = jnp.matmul(retained * rate[..., None, :], jnp.expand_dims(band, (0, 1)))
        q = self.lift(q)
        y = scale(retention, q @ jnp.swapaxes(state.weights, -1, -2))
        y -= (weigh * (q @ jnp.swapaxes(seen.keys, -1, -2))) @ pushes
        weights = retention[..., -1, None, None] * state.weights
        weights -= jnp.swapaxes(scale(weigh[..., -1, :], pushes), -1, -2) @ seen.keys

        count = rank[-1]
        order = count + jnp.arange(2 - self.window, 1)  # ranks of what is kept
        first = self.window - 1 + jnp.argmax(full)
        at = jnp.where(order > 0, first + order - 1, self.window - 2 + order)
        window = Window(*(jnp.take(part, at, axis=2) for part in seen))
        elapsed = (state.elapsed + count.astype(jnp.int32)) % self.chunk
        if state.snapshot is not None:
            snapshot = jnp.where(elapsed == 0, weights, snapshot)
        return OmegaState(weights, None if state.snapshot is None else snapshot, window, elapsed), time_first(y)


def definition(layer: OmegaMemory, weights: PyTree, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """The same layer for one sequence from its start, token by token, `jax.grad` for the errors: the slow twin."""
    _, tokens, gates = project_in(weights, layer.init_state(weights, 1).window, x[None], layer.heads, None)
    q, k, v, rate, retain, *strength = (part[:, 0] for part in (*tokens, *gates))  # (T, H, ...)
    before = lambda part: jnp.pad(part, [(layer.window - 1, 0)] + [(0, 0)] * (part.ndim - 1))
    gamma = strength[0] / layer.window if strength else jnp.ones_like(rate)
    history = [before(part) for part in (layer.lift(k), l2norm(v), gamma)]

    def gradient(memory, key, value):
        error = jax.grad(lambda y: layer.bias.loss(y, value))(memory @ key)
        return jnp.outer(bounded(error, layer.surprise), key)

    def token(carry, now):
        memory, snapshot = carry
        t, q, rate, retain = now
        snapshot = jnp.where(t % layer.chunk == 0, memory, snapshot)
        keys, values, strengths = (jax.lax.dynamic_slice_in_dim(part, t, layer.window) for part in history)
        each = jax.vmap(jax.vmap(gradient), (None, 0, 0))(snapshot, keys, values)  # (c, H, V, phi)
        memory = retain[:, None, None] * memory - layer.largest_rate * jnp.einsum("h,ch,chvk->hvk", rate, strengths, each)
        return (memory, snapshot), jnp.einsum("hvk,hk->hv", memory, layer.lift(q))

    carry = (weights["start"], weights["start"])
    _, y = jax.lax.scan(token, carry, (jnp.arange(len(x)), q, rate, retain))
    return project_out(weights, y[:, None], x.dtype)[0]
