"""The Omega rule: a matrix memory that learns from a window of tokens at once, by any attentional bias (ATLAS).

    M_t = alpha_t M_{t-1} - eta_t sum over i = t-c+1 ... t of gamma_i delta_i phi(k_i)^T          y_t = M_t phi(q_t)

with delta_i the derivative of the objective at M_b phi(k_i), M_b the memory at the last chunk boundary. With c = 1 and
another objective than l2 these are the l_p and Huber memories of MIRAS.

In a chunk, with A the retention from token to token, a that from the chunk's start, D the window's band (1 where token i is
among the last c at t) and N = A diag(eta) D, over the tokens of the window before the chunk and of the chunk,

    Y = diag(a) phi(Q) M^T - (N o phi(Q) phi(K)^T) diag(gamma) Delta
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import itemgetter
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.checks import Count, Interval, Positive, Rate
from nested_jax.description import Description
from nested_jax.errors import UserError
from nested_jax.level import Level
from nested_jax.memory import objective
from nested_jax.memory.projections import init_projections, project_in
from nested_jax.memory.recurrence import decays
from nested_jax.memory.stream import Chunk, MemoryLayer, Snapshots
from nested_jax.numerics import clip_rows, l2norm, scale
from nested_jax.typing import Array, Float, Int, PyTree


class Window(NamedTuple):
    """The last W = c - 1 tokens, oldest first, which the next ones learn from once more."""

    keys: Float[Array, "B H W phi"]  # phi(k)
    values: Float[Array, "B H W V"]
    strengths: Float[Array, "B H W"]  # gamma; 0 where there was no token yet


class OmegaState(NamedTuple):
    """Fast state of all heads.

    weights: the memory now; snapshot: at the last boundary (None: now is one); elapsed: tokens since the boundary.
    """

    weights: Float[Array, "B H V phi"]
    snapshot: Float[Array, "B H V phi"] | None
    window: Window
    elapsed: Int[Array, ""]


def assert_bounded(
    label: str, chunk: int, max_rate: float | None, surprise: float, power: float, values: str | None
) -> None:
    """Raises UserError, with the options' label, where errors of any norm would add up to more than they are in a chunk, or
    where they are powers above the first (l_p of p > 2; of the other objectives p = 2) of values of any norm.

    >>> assert_bounded("OmegaMemory: ", 7, 1.0, math.inf, 2.0, "unit")
    Traceback (most recent call last):
    nested_jax.errors.UserError: OmegaMemory: max_rate 1 makes errors of any norm grow: give at most 2 / (chunk + 1), 0.25, \
or a finite surprise
    """
    if math.isfinite(surprise):
        return
    if max_rate is not None and max_rate > (most := 2 / (chunk + 1)):
        remedy = f"give at most 2 / (chunk + 1), {math.floor(1e6 * most) / 1e6:g}, or a finite surprise"
        raise UserError(f"{label}max_rate {max_rate:.12g} makes errors of any norm grow: {remedy}")
    if power > 2 and values == "raw":
        raise UserError(
            f"{label}values raw makes errors of any norm to the power {power - 1:g} grow: give unit, or a finite surprise"
        )


@dataclass(frozen=True)
class OmegaMemory(MemoryLayer):
    """A matrix per head that learns from a window of tokens. The call is that of `SequenceLayer`.

    Args:
        width, heads, checkpoint, implementation: as of `MemoryLayer`; V = D / H.
        objective: the attentional bias: l2, lp or huber.
        window: c, tokens that every update learns from.
        features: phi, "identity", or "polynomial" for (k, k^2) entry by entry, of twice the width; of unit norm.
        chunk: tokens between two refreshes of the errors.
        power, threshold: of lp and huber.
        max_rate: largest eta; None for 2 / (chunk + 1). gamma is at most 1 / c, and 1 if c is 1.
        surprise: largest norm of an error, larger ones are scaled down to it: keeps the memory bounded at any rate.
        values: "unit", of unit norm, or "raw", the papers'.

    Raises UserError for options of another type or out of range, and for ones with which the memory would grow.

    Source: NL Eq. 68; ATLAS (arXiv 2505.23735) section 3; MIRAS (arXiv 2504.13173) section 5.

    >>> layer = OmegaMemory(8, 2, "huber", window=4)
    >>> weights = layer.init_weights(jax.random.key(0))
    >>> state, y = layer(weights, layer.init_state(weights, 1), jnp.ones((1, 5, 8)), 0)
    >>> y.shape
    (1, 5, 8)
    """

    objective: Literal["l2", "lp", "huber"] = "l2"
    window: Count = 16
    features: Literal["identity", "polynomial"] = "identity"
    power: Annotated[float, Interval(least=1, most=8)] = 3.0
    threshold: Positive = 1.0
    max_rate: Rate | None = None
    surprise: Annotated[float, Interval(above=0, finite=False)] = 2.0
    values: Literal["unit", "raw"] = "unit"
    memory_state = OmegaState
    snapshots = Snapshots(
        drop=lambda state: state._replace(snapshot=None), take=lambda state: state._replace(snapshot=state.weights)
    )

    def __post_init__(self):
        super().__post_init__()
        power = self.power if self.objective == "lp" else 2.0
        assert_bounded("OmegaMemory: ", self.chunk, self.max_rate, self.surprise, power, self.values)

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

    def project(self, weights: PyTree, x: Float[Array, "B T D"]) -> tuple[Array, ...]:
        """Queries, keys, values, rates, retentions and, for windows of more than a token, strengths."""
        return project_in(weights, x, self.heads)

    def level(self, weights: PyTree, batch_size: int) -> Level:
        """The memories of all heads, state `OmegaState`."""

        def init(slower):
            start = jnp.broadcast_to(weights["start"], (batch_size, *weights["start"].shape))
            B, H, V, K = start.shape
            empty = lambda *shape: jnp.zeros((B, H, self.window - 1, *shape), start.dtype)
            return OmegaState(start, start, Window(empty(K), empty(V), empty()), jnp.zeros((), jnp.int32))

        step = lambda state, context, slower: self.learn(state, jax.tree.map(itemgetter(0), context))
        one, due = self.bias.name, lambda state: state.elapsed == 0
        description = Description(
            objective=one if self.window == 1 else f"sum over the last {self.window} tokens of gamma ({one})",
            rule="gradient descent, decay",
            context="keys and values of tokens",
            knowledge="direct parametric conditioning: slow weights make keys, values and gates",
        )
        name = f"{self.objective} memory" if self.window == 1 else "omega memory"
        return Level(init, step, 1, name, due, description=description, tokens=self.chunk)

    def strength(
        self, rate: Float[Array, "*batch C"], gate: Float[Array, "*batch C"] | None = None
    ) -> Float[Array, "*batch C"]:
        """gamma; of a window of one token it would only be a factor of the rate."""
        return jnp.ones_like(rate) if gate is None else gate / self.window

    def learn(self, state: OmegaState, chunk: Chunk) -> tuple[OmegaState, Float[Array, "B H C V"]]:
        """Learns from one chunk, and reads at each of its tokens."""
        q, k, v, rate, retain, *gate = chunk.tokens
        C = k.shape[2]
        full = jnp.ones(C, bool) if chunk.mask is None else chunk.mask
        rate = jnp.where(full[None, None], self.largest_rate * rate, 0.0)
        strength = jnp.where(full[None, None], self.strength(rate, *gate), 0.0)
        snapshot = state.weights if state.snapshot is None else state.snapshot

        join = lambda old, new: jnp.concatenate([old, new], axis=2)
        seen = Window(*map(join, state.window, (self.lift(k), l2norm(v) if self.values == "unit" else v, strength)))
        errors = clip_rows(self.bias.error(seen.keys @ jnp.swapaxes(snapshot, -1, -2), seen.values), self.surprise)
        pushes = scale(seen.strengths, errors)

        rank = jnp.cumsum(full)  # of every token in the order of time, those of the window at 0, -1, ...
        age = rank[:, None] - jnp.concatenate([jnp.arange(2 - self.window, 1), rank])[None]
        band = ((age >= 0) & (age < self.window)).astype(k.dtype)
        decay = decays(retain, mask=full[None, None])
        weigh = jnp.matmul(decay.retained * rate[..., None, :], jnp.expand_dims(band, (0, 1)))
        q = self.lift(q)
        y = scale(decay.retention, q @ jnp.swapaxes(state.weights, -1, -2))
        y -= (weigh * (q @ jnp.swapaxes(seen.keys, -1, -2))) @ pushes
        weights = decay.retention[..., -1, None, None] * state.weights
        weights -= jnp.swapaxes(scale(weigh[..., -1, :], pushes), -1, -2) @ seen.keys

        count = rank[-1]
        order = count + jnp.arange(2 - self.window, 1)  # ranks of what is kept
        first = self.window - 1 + jnp.argmax(full)
        at = jnp.where(order > 0, first + order - 1, self.window - 2 + order)
        window = Window(*(jnp.take(part, at, axis=2) for part in seen))
        elapsed = (state.elapsed + count.astype(jnp.int32)) % self.chunk
        if state.snapshot is not None:
            snapshot = jnp.where(elapsed == 0, weights, snapshot)
        return OmegaState(weights, None if state.snapshot is None else snapshot, window, elapsed), y
