"""Fixed projections of tokens to keys, values, queries and gates."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nested_jax.checks import check_key
from nested_jax.memory.stream import CONVOLUTION
from nested_jax.numerics import BATCH, HEADS, TOKENS, l2norm, lay, normal, upcast
from nested_jax.typing import Array, Float, PyTree


def init_projections(key: Array, width: int, heads: int, gates: int) -> dict[str, Array]:
    """Weights of a `MemoryLayer` with these projections: taps, maps to q, k, v and gates, head norm, output map.

    The gates are, in this order, rate (started near 0.27), retention (near 1) and momentum (0.5).
    """
    check_key("init_weights", key)
    D, H = width, heads
    keys = jax.random.split(key, 3)
    biases = [jnp.full(H, -1.0, jnp.float32), retention_bias(H), jnp.zeros(H)]
    weights = {
        "taps": jnp.zeros((CONVOLUTION, D)).at[-1].set(1.0),
        **init_qkv(keys[0], D),
        "norm": jnp.ones((H, D // H)),
        "out": normal(keys[2], (D, D)) * D**-0.5,
    }
    if gates:
        weights["gates"] = normal(keys[1], (D, gates * H)) * 0.1 * D**-0.5
        weights["gates_bias"] = jnp.concatenate(biases[:gates])
    return weights


def init_qkv(key: Array, width: int) -> dict[str, Array]:
    """Maps (D, D) of tokens to queries, keys and values."""
    q, k, v = jnp.split(normal(key, (width, 3 * width)) * width**-0.5, 3, axis=1)
    return {"query": q, "key": k, "value": v}


def qkv(
    weights: PyTree, x: Float[Array, "B T D"], heads: int, tokens: str | None = None
) -> tuple[Float[Array, "B T H K"], ...]:
    """Queries, keys and values of tokens, of x's type, laid along the mesh's axis of heads, and of tokens if it is given.

    weights: query, key and value (D, D); bias (3, D) of them, where there is one.
    """
    split = lambda y: lay(y.reshape(*x.shape[:2], heads, -1), BATCH, tokens, HEADS)
    made = [x @ weights[name].astype(x.dtype) for name in ("query", "key", "value")]
    if "bias" in weights:
        made = [y + bias.astype(x.dtype)[None, None] for y, bias in zip(made, weights["bias"], strict=True)]
    q, k, v = map(split, made)
    return q, k, v


def project_in(weights: PyTree, x: Float[Array, "B T D"], heads: int) -> tuple[Array, ...]:
    """(q, k, v, *gates) of convolved tokens: (B, T, H, K) with q and k of unit norm, then (B, T, H) in (0, 1), if any."""
    B, T, _ = x.shape
    q, k, v = (upcast(y) for y in qkv(weights, x, heads, TOKENS))
    if "gates" not in weights:
        return l2norm(q), l2norm(k), v
    gates = jax.nn.sigmoid(upcast(x @ weights["gates"].astype(x.dtype)) + weights["gates_bias"][None, None])
    gates = gates.reshape(B, T, -1, heads)
    return l2norm(q), l2norm(k), v, *(gates[:, :, i] for i in range(gates.shape[2]))


def retention_bias(heads: int) -> Float[Array, " H"]:
    """Starts of the retention's logits: alpha from 0.993 to 0.9997, half-lives of 100 to 2,000 tokens over the heads."""
    return jnp.linspace(5.0, 8.0, heads)
