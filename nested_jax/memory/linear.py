"""Linear memories with fixed projections: Hebbian with decay, delta rule, gated delta rule, Oja's rule.

    linear       M_t = alpha_t M_{t-1} + eta_t v_t k_t^T                                             (NL Eq. 64)
    delta        M_t = M_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T                               (NL Eq. 65)
    gated-delta  M_t = alpha_t M_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T                       (GatedDeltaNet)
    oja          M_t = alpha_t M_{t-1} - eta_t v_t v_t^T M_{t-1} + eta_t v_t k_t^T                   (NL Eq. 66-67)

Each reads y_t = M_t q_t. None depends on where chunks begin: the chunk is only the length of a parallel product. Oja's rule
erases on the side of the values, which are of unit norm there: it is the recurrence of M^T, read from the other side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.description import Description
from nested_jax.level import Level
from nested_jax.memory.projections import heads_first, init_projections, project_in, project_out, time_first
from nested_jax.memory.recurrence import Gates, MemoryState, chunked, read_transposed, write
from nested_jax.memory.stream import CONVOLUTION, StreamState, advance, read_stream
from nested_jax.numerics import l2norm
from nested_jax.remat import Checkpoint
from nested_jax.typing import Array, Float, PyTree


@dataclass(frozen=True)
class LinearMemory:
    """A matrix per head that learns while reading. The call is (weights, state, x (B, T, D)) -> (state, y (B, T, D)).

    Args:
        width, heads: D and H, K = D / H.
        rule: see above.
        chunk: tokens of one parallel product.
        checkpoint: what the backward pass keeps, in chunks, see `nested_jax.meta.unroll`.
    """

    width: int
    heads: int
    rule: Literal["linear", "delta", "gated-delta", "oja"] = "gated-delta"
    chunk: int = 64
    checkpoint: Checkpoint = "full"

    def init_weights(self, key: Array) -> dict[str, PyTree]:
        """Learned parameters, float32; start is the memories' initial state (H, V, K), (H, K, V) of Oja's rule."""
        K = self.width // self.heads
        weights = init_projections(key, self.width, self.heads, gates=1 if self.rule == "delta" else 2)
        return {**weights, "start": jnp.zeros((self.heads, K, K))}

    def init_state(self, weights: PyTree, batch: int, max_length: int | None = None) -> StreamState:
        """Fast state at the starts: a differentiable function of the weights."""
        start = MemoryState(jnp.repeat(weights["start"][None], batch, axis=0))
        window = jnp.zeros((batch, CONVOLUTION - 1, self.width), weights["taps"].dtype)
        return StreamState(start, window, np.int32(0))

    def gates(self, rate: Array, retain: Array | None) -> Gates:
        """The rule, as gates of the recurrence with errors -v, or of M^T with errors -k: delta rules erase what decayed."""
        if self.rule == "linear":
            return Gates(rate, jnp.zeros_like(rate), retain)
        if self.rule == "delta":
            return Gates(rate, rate, jnp.ones_like(rate))
        if self.rule == "oja":
            return Gates(rate, rate, retain)
        return Gates(rate, retain * rate, retain)

    def __call__(self, weights, state, x, *, reset=None, aligned=False):
        window, (q, k, v), (rate, *retain) = project_in(weights, state.window, x, self.heads, reset)
        memory, y = read_stream(
            self._level(weights, len(x)), state.memory, (q, k, v, rate, *retain),
            position=state.position, aligned=aligned, reset=reset, checkpoint=self.checkpoint,
        )  # fmt: skip
        return StreamState(memory, window, advance(state.position, x.shape[1])), project_out(weights, y, x.dtype)

    def levels(self, weights: PyTree, batch: int) -> tuple[Level, ...]:
        """What learns in it."""
        return (self._level(weights, batch),)

    def _level(self, weights: PyTree, batch: int) -> Level:
        def step(memory, chunk, slower):
            q, k, v, rate, *retain = (heads_first(part) for part in chunk.tokens)
            mask = None if chunk.mask is None else chunk.mask[None, None]
            if self.rule == "oja":
                written = write(memory, l2norm(v), -k, self.gates(rate, *retain), mask=mask)
                return written.state, time_first(read_transposed(written, q))
            memory, y = chunked(memory, k, -v, self.gates(rate, *retain or [None]), q, mask=mask)
            return memory, time_first(y)

        description = Description(
            objective={"linear": "-<M k, v>", "oja": "-<M k, v> + 1/2 |M^T v|^2"}.get(self.rule, "1/2 |M k - v|^2"),
            rule="gradient descent" if self.rule == "delta" else "gradient descent, decay",
            context="keys and values of tokens",
            knowledge="direct parametric conditioning: slow weights make keys, values and gates",
            updates=self.chunk,
        )
        init, due = lambda slower: self.init_state(weights, batch).memory, lambda memory: jnp.asarray(True)
        return Level(init, step, self.chunk, f"{self.rule} memory", due, description=description)


def definition(layer: LinearMemory, weights: PyTree, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """The same layer for one sequence from its start, token by token, in the words of the rule: the slow twin."""
    window = layer.init_state(weights, 1).window
    _, tokens, gates = project_in(weights, window, x[None], layer.heads, None)
    q, k, v, rate, *retain = (part[:, 0] for part in (*tokens, *gates))  # (T, H, ...)

    def token(memory, now):
        q, k, v, rate, *retain = now
        if layer.rule == "oja":
            v = l2norm(v)
            erased = jnp.einsum("h,hv,hu,huk->hvk", rate, v, v, memory)
            memory = retain[0][:, None, None] * memory - erased + jnp.einsum("h,hv,hk->hvk", rate, v, k)
            return memory, jnp.einsum("hvk,hk->hv", memory, q)
        if layer.rule != "delta":
            memory = retain[0][:, None, None] * memory
        held = jnp.einsum("hvk,hk->hv", memory, k) if layer.rule != "linear" else 0.0
        memory = memory + jnp.einsum("h,hv,hk->hvk", rate, v - held, k)
        return memory, jnp.einsum("hvk,hk->hv", memory, q)

    start = weights["start"].swapaxes(1, 2) if layer.rule == "oja" else weights["start"]
    _, y = jax.lax.scan(token, start, (q, k, v, rate, *retain))
    return project_out(weights, y[:, None], x.dtype)[0]
