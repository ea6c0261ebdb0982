"""Titans: one deep memory a head, with fixed projections of its keys, values, queries and gates."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from nested_jax.checks import Count, Rate, check_key
from nested_jax.level import Level
from nested_jax.memory.deep import (
    SNAPSHOTS,
    Deep,
    LevelState,
    Rule,
    Strengths,
    broadcast_start,
    count_tokens,
    deep_start,
    describe_memory,
    forward,
    init_level_state,
    learn,
    memory_level,
)
from nested_jax.memory.projections import init_projections, project_in
from nested_jax.memory.stream import MemoryLayer
from nested_jax.numerics import l2norm
from nested_jax.typing import Array, Float, PyTree

if TYPE_CHECKING:
    from nested_jax.memory.pallas.form import Form


def titans_rate(chunk: int, max_rate: float | None) -> float:
    """eta_max of Titans: errors are those of the chunk's start, so its steps must not add up to much more than one.

    >>> titans_rate(64, None), titans_rate(64, 0.5)
    (0.0625, 0.5)
    """
    return 4 / chunk if max_rate is None else max_rate


@dataclass(frozen=True)
class Titans(MemoryLayer):
    """Titans' deep memory with fixed projections and momentum. The call is that of `SequenceLayer`.

        S_t = theta_t S_{t-1} - eta_t grad 1/2 |M(k_t) - v_t|^2        M_t = alpha_t M_{t-1} + S_t        y_t = M_t(q_t)

    with keys and queries of unit norm.

    Args:
        width, heads, checkpoint, implementation: as of `MemoryLayer`; K = D / H.
        hidden: hidden width F of the memory.
        chunk: tokens between two refreshes of the errors.
        momentum: writes carry momentum; their strength is then eta (1 - theta), see `Rule.damped`.
        max_rate: largest eta; None for 4 / chunk.
        rule: see `Rule`.
        values: "unit", of unit norm, or "raw", the paper's.

    Source: Titans Eq. 8-15.

    >>> layer = Titans(8, 2, 4, chunk=4)
    >>> weights = layer.init_weights(jax.random.key(0))
    >>> state, y = layer(weights, layer.init_state(weights, 1), jax.numpy.ones((1, 4, 8)), 0)
    >>> y.shape
    (1, 4, 8)
    """

    hidden: Count = 32
    momentum: bool = True
    max_rate: Rate | None = None
    rule: Rule = Rule(erase="none")
    values: Literal["unit", "raw"] = "unit"
    snapshots = SNAPSHOTS
    memory_state = LevelState

    def __post_init__(self):
        super().__post_init__()
        self.rule.assert_bounded("Titans: ", self.largest_rate, self.momentum)

    @property
    def largest_rate(self) -> float:
        """eta_max."""
        return titans_rate(self.chunk, self.max_rate)

    def form(self, dtype: jnp.dtype) -> Form | str:
        """See `MemoryLayer`."""
        from nested_jax.memory.pallas.titans import form_of

        return form_of(self, dtype)

    def init_weights(self, key: Array) -> dict[str, PyTree]:
        """Learned parameters, float32; start is the memories' initial state."""
        check_key("Titans", key)
        project, start = jax.random.split(key)
        K = self.width // self.heads
        weights = init_projections(project, self.width, self.heads, gates=3 if self.momentum else 2)
        return {**weights, "start": deep_start(start, 1, self.heads, K, self.hidden)}

    def project(self, weights: PyTree, x: Float[Array, "B T D"]) -> tuple[Array, ...]:
        """Queries, keys, values, rates, retentions and, with momentum, its decays."""
        return project_in(weights, x, self.heads)

    def level(self, weights: PyTree, batch_size: int) -> Level:
        """The memories of all heads, state `LevelState`."""
        starts = Deep(**weights["start"])
        start = broadcast_start(starts, batch_size)

        def act(running, snapshot, context, slower):
            chunk = jax.tree.map(itemgetter(0), context)
            q, k, v, rate, retain, *momentum = chunk.tokens
            strengths = Strengths(self.largest_rate * rate, retain, momentum[0] if self.momentum else None)
            keys, targets = forward(snapshot, k), (l2norm(v) if self.values == "unit" else v)[:, :, None]
            running, y = learn(running, snapshot, start, keys, targets, strengths, self.rule, chunk.mask, q)
            return running, y, count_tokens(chunk)

        description = describe_memory(
            self.rule, self.momentum, "1/2 |M(k) - v|^2", "keys and values of tokens",
            "direct parametric conditioning: slow weights make keys, values and gates",
        )  # fmt: skip
        init = lambda slower: init_level_state(starts, batch_size, self.momentum)
        return memory_level(init, act, 1, self.chunk, "deep memory", description)
