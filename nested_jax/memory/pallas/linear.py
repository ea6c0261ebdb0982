"""Linear memories' chunk on tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from nested_jax.memory.pallas.form import Form, Tiled, rows_of
from nested_jax.memory.pallas.recurrence import Map, decays, read, write
from nested_jax.memory.pallas.tiles import column, dot, rounded, square
from nested_jax.memory.recurrence import MemoryState
from nested_jax.numerics import upcast

if TYPE_CHECKING:
    from nested_jax.memory.linear import LinearMemory


def form_of(layer: LinearMemory, dtype) -> Form:
    """How a kernel reads the layer's memory of tokens of a type: products of bfloat16 tokens are of bfloat16."""
    fast = dtype == jnp.bfloat16

    def step(_, weights, wide, gates, found=None):
        q, k, v = wide[0], rounded(wide[1], fast), wide[2]
        write_rate, erase, retain = (column(gates[i : i + 1]) for i in range(3))
        no_erase = layer.rule == "linear"
        if not no_erase:  # a key of bfloat16 may be longer than 1, and rates near 2 would make what it holds grow
            over = jax.lax.stop_gradient(jnp.maximum(square(k), 1.0))
            write_rate, erase = write_rate / over, erase / over
        decay = decays(retain, None, fast)
        one = Map(
            k, -v, dot(k, weights, 1, 1, fast), write_rate, None if no_erase else erase, weights, turns=layer.max_rate > 1
        )
        (written,), found = write([one], decay, fast, found)
        return written.weights, read(one, written, decay, q, fast), found

    def lay(weights, memory, tokens) -> Tiled:
        q, k, v, *gates = tokens
        v = layer.normalised(v)
        wide = [x.reshape(*x.shape[:2], -1) for x in (q, k, v)]
        return Tiled(upcast(weights["start"]), memory.weights, wide, rows_of(list(layer.gates(*gates)[:3]), layer.chunk))

    size = 4 * (layer.width // layer.heads) ** 2
    return Form(step, lambda start: start, lay, MemoryState, layer.chunk, layer.heads, 1, size)
