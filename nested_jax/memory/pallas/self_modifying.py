"""Self-modifying Titans' chunk on tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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
    normalise,
    unit,
)
from nested_jax.memory.pallas.form import Form, Tiled, rows_of
from nested_jax.memory.pallas.tiles import column, dot, rounded
from nested_jax.numerics import upcast
from nested_jax.typing import Array, Float, PyTree

if TYPE_CHECKING:
    from nested_jax.memory.self_modifying import SelfModifyingTitans


class Weights(NamedTuple):
    """Of a head: the starts, and what makes R logits of gates, those of rates first, retention's last."""

    start: Layers
    gates: Float[Array, "R K"]
    biases: Float[Array, "1 R"]


def form_of(layer: SelfModifyingTitans, dtype) -> Form:
    """How a kernel reads the layer's memories of tokens of a type: products of bfloat16 tokens are of bfloat16."""
    names, fast = layer.memories, dtype == jnp.bfloat16
    made_of = {name: m for m, name in enumerate(names[:-1])}
    M = len(names)
    fixed = [name for name in ("queries", "keys", "values") if name not in made_of]

    def step(weights: Weights, state: Fast, wide, gates, found=None):
        x, *rest = wide
        given = dict(zip(fixed, rest, strict=True))
        made = {}
        if M > 1:
            size = weights.start.first.shape[0] // M
            some = Layers(state.weights.first[: (M - 1) * size], state.weights.second[:-1])
            _, _, second = forward(some, x, fast)
            made = {name: x + second[m] for name, m in made_of.items()}
        keys, queries = (unit(made[name]) if name in made else given[name] for name in ("keys", "queries"))
        keys = rounded(keys, fast)
        values = normalise(made["values"], layer.targets) if "values" in made else given["values"]
        logits = lambda name: dot(made.get(name, x), weights.gates, 1, 1, fast) + weights.biases
        sigmoid, R = jax.nn.sigmoid, weights.gates.shape[0]
        rates = layer.max_rate * sigmoid(logits("rates"))
        rate = [rates[:, i : i + 1] for i in range(R - 1)]
        retain = sigmoid(logits("retention"))[:, R - 1 :]
        theta = None
        if gates is not None:
            theta = column(gates)
        strengths = Strengths(rate[0], rate[1:] or rate * M, retain, theta)

        C = keys.shape[0]
        before, hidden, second = forward(state.weights, jnp.concatenate([keys, values], axis=0), fast)
        targets = [normalise(values + held[C:], layer.targets) for held in second]
        held = before[:C], [h[:C] for h in hidden], [s[:C] for s in second]
        return learn(state, weights.start, keys, held, targets, strengths, layer.rule, queries, fast, found)

    def start(weights: Weights):
        zeros = jax.tree.map(jnp.zeros_like, weights.start) if layer.momentum else None
        return Fast(weights.start, zeros)

    def lay(weights: PyTree, running: xla.Deep, tokens) -> Tiled:
        weights = upcast(weights)
        x, given, theta = tokens  # x was upcast from the tokens' type
        B, T, H, K = x.shape
        rate = weights["rate"].reshape(H, -1, K)
        gates = jnp.concatenate([rate, weights["retention"][:, None]], axis=1)
        biases = jnp.concatenate([weights["rate_bias"].reshape(H, -1), weights["retention_bias"][:, None]], axis=1)
        wide = [x.astype(dtype), *(given[name] for name in fixed)]
        return Tiled(
            Weights(layers_of(xla.Deep(**weights["start"])), gates, biases[:, None]),
            fast_of(running),
            [each.reshape(B, T, H * K) for each in wide],
            None if theta is None else rows_of([theta], layer.chunk),
        )

    return Form(step, start, lay, memories_of, layer.chunk, layer.heads, M + 1, bytes_of(layer, M), layer.hidden, *LEVEL)
