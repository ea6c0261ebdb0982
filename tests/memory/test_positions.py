"""Positions do not run out: what a layer or a model reads at a large position is what it reads at a small one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rare import cases

from nested_jax.memory.attention import Attention, rotate
from nested_jax.memory.stream import bounded

FAR = (2**20, 2**24, 2**30 - 5, 3 * 2**29 - 5, 2**31 - 13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rotary_products_depend_on_the_distance_alone(x64, dtype):
    """At any position, across the last int32 too, those near 0; by float64, those of 10,000^(-2i/K)."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 8, 2, 16), dtype)
    near, distance = jnp.arange(8, dtype=jnp.int32)[None], 3
    product = jax.jit(lambda start: jnp.sum(rotate(q, near + start + distance) * rotate(k, near + start), axis=-1))
    angle = distance * 10_000.0 ** (-np.arange(8) / 8)
    first, second = np.split(np.asarray(q, np.float64), 2, -1)
    turned = [first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)]
    twin = np.sum(np.concatenate(turned, -1) * np.asarray(k, np.float64), -1)
    for start in (0, *FAR, 2**31 - 5):
        tolerance = {"float32": 5e-6, "float64": 1e-7}[dtype]  # float64: the rounding of the frequencies
        np.testing.assert_allclose(product(jnp.int32(start)), twin, rtol=0, atol=tolerance)
        if dtype == "float64":
            np.testing.assert_allclose(product(jnp.int32(start)), product(jnp.int32(0)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("period", [1, 12, 64, 2**30])
def test_a_bounded_position_keeps_its_place(period):
    """Known or traced: below 1.5 * 2^30 from any int32 on, at the same place of a period, and not at the start."""
    for position in (0, 5, *FAR, 2**31 - 1):
        known, traced = bounded(np.int32(position), period), jax.jit(bounded, static_argnums=1)(position, period)
        assert int(known) == int(traced) and (int(known) - position) % period == 0
        assert 0 <= known < 3 * 2**29 and (known > 0) == (position > 0)
        assert known == position or known >= 2**29


@pytest.mark.parametrize("window", cases([None, 3], [3]))
def test_attention_far_into_a_document(window):
    """A ring of any size, in calls of one and of several tokens: outputs and gradients of a document just begun."""
    layer = Attention(8, 2, window)
    weights = layer.init_weights(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 13, 8))

    def loss(weights, x, skipped):
        empty, outputs = layer.init_state(weights, 2, 7), []
        state, _ = layer(weights, empty._replace(document=empty.document + skipped), x[:, :7], skipped)
        for begin, end in ((7, 8), (8, 13)):
            state, y = layer(weights, state, x[:, begin:end], begin + skipped)
            outputs.append(y)
        y = jnp.concatenate(outputs, 1)
        return jnp.sin(y).sum(), y

    both = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    near = both(weights, x, jnp.int32(0))
    for start in FAR:
        far = both(weights, x, jnp.int32(start))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), far, near)
