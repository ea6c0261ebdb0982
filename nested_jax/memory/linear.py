"""Linear memories with fixed projections: Hebbian with decay, delta rule, gated delta rule, Oja's rule.

    linear       M_t = alpha_t M_{t-1} + eta_t v_t k_t^T                                             (NL Eq. 64)
    delta        M_t = M_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T                               (NL Eq. 65)
    gated-delta  M_t = alpha_t M_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T                       (GatedDeltaNet)
    oja          M_t = alpha_t M_{t-1} - eta_t v_t v_t^T M_{t-1} + eta_t v_t k_t^T                   (NL Eq. 66-67)

Each reads y_t = M_t q_t. None depends on where chunks begin: the chunk is only the length of a parallel product. Oja's rule
erases on the side of the values, which are of unit norm there: it is the recurrence of M^T, with transposed reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from nested_jax.checks import Rate
from nested_jax.description import Description
from nested_jax.errors import UserError
from nested_jax.level import Level
from nested_jax.memory.projections import init_projections, project_in
from nested_jax.memory.recurrence import Gates, MemoryState, chunked, read_transposed, write
from nested_jax.memory.stream import MemoryLayer
from nested_jax.numerics import l2norm
from nested_jax.typing import Array, Float, PyTree

if TYPE_CHECKING:
    from nested_jax.memory.pallas.form import Form

LARGEST = 2 - 2**-12
"""Rate of a rule that erases: at 2 itself, a sigmoid's in float32, rounding makes what a repeated key holds grow."""


def assert_bounded(label: str, rule: str, max_rate: float, values: str | None) -> None:
    """Raises UserError, with the options' label, where what a memory of a rule holds would grow at every token.

    >>> assert_bounded("LinearMemory: ", "delta", 2.5, None)
    Traceback (most recent call last):
    nested_jax.errors.UserError: LinearMemory: max_rate 2.5 makes what delta holds grow at every token: give at most 2
    """
    most = {"linear": math.inf, "oja": 1}.get(rule, 2)  # oja: factor alpha - eta, of any alpha
    if max_rate > most:
        raise UserError(f"{label}max_rate {max_rate:.12g} makes what {rule} holds grow at every token: give at most {most}")
    if rule == "oja" and values == "raw":
        raise UserError(f"{label}values raw may make what oja holds grow, which erases by values: give unit")


@dataclass(frozen=True)
class LinearMemory(MemoryLayer):
    """A matrix per head that learns while reading. The call is that of `SequenceLayer`.

    Args:
        width, heads, chunk, checkpoint, implementation: as of `MemoryLayer`.
        rule: see above.
        max_rate: largest eta. Beyond 1 the delta rules turn the sign of what they hold along a key, with which a memory
            tracks states ("Unlocking State-Tracking", arXiv 2411.12537); beyond 2, Oja's rule beyond 1, it would grow.
        values: "unit", of unit norm, or "raw"; None: raw but of Oja's rule, which erases by values and so needs unit ones.
        gated: whether eta and alpha are learned, of the token; else they are max_rate and 1, as in linear attention.

    Raises UserError for options of another type or out of range, and for ones with which the memory would grow.

    Source: NL Eq. 64-67.

    >>> layer = LinearMemory(8, 2, "delta")
    >>> weights = layer.init_weights(jax.random.key(0))
    >>> state, y = layer(weights, layer.init_state(weights, 1), jnp.ones((1, 5, 8)), 0)
    >>> y.shape
    (1, 5, 8)
    """

    rule: Literal["linear", "delta", "gated-delta", "oja"] = "gated-delta"
    max_rate: Rate = 1.0
    values: Literal["unit", "raw"] | None = None
    gated: bool = True
    memory_state = MemoryState

    def __post_init__(self):
        super().__post_init__()
        assert_bounded("LinearMemory: ", self.rule, self.max_rate, self.values)

    def normalised(self, values: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
        """Values by the layer's option."""
        return l2norm(values) if self.values == "unit" or self.rule == "oja" else values

    def form(self, dtype: jnp.dtype) -> Form | str:
        """See `MemoryLayer`."""
        if self.rule == "oja":
            return "no kernel of Oja's rule, whose reads are transposed"
        from nested_jax.memory.pallas.linear import form_of

        return form_of(self, dtype)

    def init_weights(self, key: Array) -> dict[str, PyTree]:
        """Learned parameters, float32; start is the memories' initial state (H, V, K), (H, K, V) of Oja's rule."""
        K = self.width // self.heads
        gates = (1 if self.rule == "delta" else 2) if self.gated else 0
        weights = init_projections(key, self.width, self.heads, gates)
        return {**weights, "start": jnp.zeros((self.heads, K, K))}

    def gates(self, rate: Float[Array, "*batch C"], retain: Float[Array, "*batch C"] | None = None) -> Gates:
        """The rule, as gates of the recurrence with errors -v, or of M^T with errors -k: delta rules erase what decayed."""
        retain = jnp.ones_like(rate) if retain is None else retain
        erase = {"linear": jnp.zeros_like(rate), "gated-delta": retain * rate}.get(self.rule, rate)
        return Gates(rate, erase, retain)

    def project(self, weights: PyTree, x: Float[Array, "B T D"]) -> tuple[Array, ...]:
        """Queries, keys, values, rates and, but for the delta rule, learned retentions."""
        q, k, v, *gates = project_in(weights, x, self.heads)
        rate, *retain = gates or [jnp.ones_like(k[..., 0])]
        rate = self.max_rate * rate
        return q, k, v, rate if self.rule == "linear" else jnp.minimum(rate, LARGEST), *retain

    def level(self, weights: PyTree, batch_size: int) -> Level:
        """The memories of all heads, state `MemoryState` (B, H, V, K)."""

        def step(memory, context, slower):
            (q, k, v, *gates), mask, _ = jax.tree.map(itemgetter(0), context)
            mask = None if mask is None else mask[None, None]
            v = self.normalised(v)
            if self.rule == "oja":
                written = write(memory, v, -k, self.gates(*gates), mask=mask)
                return written.state, read_transposed(written, q)
            return chunked(memory, k, -v, self.gates(*gates), q, mask=mask)

        description = Description(
            objective={"linear": "-<M k, v>", "oja": "-<M k, v> + 1/2 |M^T v|^2"}.get(self.rule, "1/2 |M k - v|^2"),
            rule="gradient descent, decay" if self.gated and self.rule != "delta" else "gradient descent",
            context="keys and values of tokens",
            knowledge="direct parametric conditioning: slow weights make keys, values and gates",
            updates=self.chunk,
        )
        init = lambda slower: MemoryState(jnp.broadcast_to(weights["start"], (batch_size, *weights["start"].shape)))
        due = lambda memory: jnp.asarray(True)
        return Level(init, step, 1, f"{self.rule} memory", due, description=description, tokens=self.chunk)
