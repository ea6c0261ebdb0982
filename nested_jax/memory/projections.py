"""Fixed projections around a memory: what makes its keys, values, queries and gates, and what reads its output."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from nested_jax.memory.stream import CONVOLUTION, convolve
from nested_jax.numerics import l2norm, rms_norm, upcast
from nested_jax.typing import Array, Bool, Float, PyTree


def init_projections(key: Array, width: int, heads: int, gates: int) -> dict[str, Array]:
    """Weights of `project_in` and `project_out`: a short convolution, q, k, v and gate maps, head norm, output map.

    The gates are, in this order, rate (started near 0.27), retention (near 1) and momentum (0.5).
    """
    D, H = width, heads
    keys = jax.random.split(key, 3)
    biases = [jnp.full(H, -1.0, jnp.float32), retention_bias(H), jnp.zeros(H)]
    return {
        "taps": jnp.zeros((CONVOLUTION, D)).at[-1].set(1.0),
        "project": jax.random.normal(keys[0], (D, 3 * D)) * D**-0.5,
        "gates": jax.random.normal(keys[1], (D, gates * H)) * 0.1 * D**-0.5,
        "gates_bias": jnp.concatenate(biases[:gates]),
        "norm": jnp.ones((H, D // H)),
        "out": jax.random.normal(keys[2], (D, D)) * D**-0.5,
    }


def project_in(
    weights: PyTree, window: Float[Array, "B W D"], x: Float[Array, "B T D"], heads: int, reset: Bool[Array, "B T"] | None
) -> tuple[Array, tuple[Array, ...], list[Array]]:
    """(convolution window, (q, k, v) of (T, B, H, K) with q and k of unit norm, gates of (T, B, H) in (0, 1))."""
    B, T, _ = x.shape
    window, x = convolve(weights["taps"], window, x, reset)
    split = lambda y: upcast(y).reshape(B, T, heads, -1).swapaxes(0, 1)
    q, k, v = (split(y) for y in jnp.split(x @ weights["project"].astype(x.dtype), 3, axis=-1))
    gates = jax.nn.sigmoid(upcast(x @ weights["gates"].astype(x.dtype)) + weights["gates_bias"][None, None])
    return window, (l2norm(q), l2norm(k), v), jnp.split(gates.swapaxes(0, 1), gates.shape[-1] // heads, axis=-1)


@partial(jax.checkpoint, static_argnums=2)  # the backward pass keeps the memory's output, not its normalised copy too
def project_out(weights: PyTree, y: Float[Array, "T B H K"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
    """RMS norm of every head, then the output map."""
    y = rms_norm(weights["norm"], y.swapaxes(0, 1))
    return y.reshape(*y.shape[:2], -1).astype(dtype) @ weights["out"].astype(dtype)


def retention_bias(heads: int) -> Float[Array, " H"]:
    """Starts of the retention's logits: alpha from 0.993 to 0.9997, half-lives of 100 to 2,000 tokens over the heads."""
    return jnp.linspace(5.0, 8.0, heads)


def heads_first(x: Float[Array, "C B H ..."]) -> Float[Array, "B H C ..."]:
    """From the layout of a stream to that of the recurrence."""
    return jnp.moveaxis(x, 0, 2)


def time_first(x: Float[Array, "B H C ..."]) -> Float[Array, "C B H ..."]:
    """The inverse of `heads_first`."""
    return jnp.moveaxis(x, 2, 0)
