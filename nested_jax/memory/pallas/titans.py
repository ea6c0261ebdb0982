"""Titans' chunk on tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from nested_jax.memory import deep as xla
from nested_jax.memory.pallas.deep import (
    LEVEL,
    Fast,
    Layers,
    Strengths,
    bytes_of,
    fast_of,
    forward,
    layers_of,
    learn,
    memories_of,
    unit,
)
from nested_jax.memory.pallas.form import Form, Tiled, rows_of
from nested_jax.memory.pallas.tiles import column, rounded
from nested_jax.numerics import upcast

if TYPE_CHECKING:
    from nested_jax.memory.titans import Titans


def form_of(layer: Titans, dtype) -> Form:
    """How a kernel reads the layer's memory of tokens of a type: products of bfloat16 tokens are of bfloat16."""
    fast = dtype == jnp.bfloat16

    def step(weights: Layers, state: Fast, wide, gates, found=None):
        q, k, v = wide[0], rounded(wide[1], fast), wide[2]
        rate, retain, *momentum = (column(gates[i : i + 1]) for i in range(gates.shape[0]))
        rate = layer.largest_rate * rate
        strengths = Strengths(rate, [rate], retain, momentum[0] if layer.momentum else None)
        values = unit(v) if layer.values == "unit" else v
        return learn(state, weights, k, forward(state.weights, k, fast), [values], strengths, layer.rule, q, fast, found)

    def start(weights: Layers) -> Fast:
        return Fast(weights, jax.tree.map(jnp.zeros_like, weights) if layer.momentum else None)

    def lay(weights, memories, tokens) -> Tiled:
        q, k, v, *gates = tokens
        wide = [x.reshape(*x.shape[:2], -1) for x in (q, k, v)]
        return Tiled(layers_of(xla.Deep(**upcast(weights["start"]))), fast_of(memories), wide, rows_of(gates, layer.chunk))

    return Form(step, start, lay, memories_of, layer.chunk, layer.heads, 2, bytes_of(layer, 1), layer.hidden, *LEVEL)
