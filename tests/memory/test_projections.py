"""Norms, gates' starts and rotary positions against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory.attention import rotate
from nested_jax.memory.deep import Deep, broadcast_start
from nested_jax.memory.linear import LinearMemory
from nested_jax.memory.projections import project_in
from nested_jax.memory.self_modifying import SelfModifyingTitans
from nested_jax.memory.titans import Titans
from nested_jax.numerics import l2norm, rms_norm


def normal(*shape):
    return jax.random.normal(jax.random.key(0), shape, jnp.float64)


def test_norms(x64):
    x = 3 * normal(5, 8)
    np.testing.assert_allclose(jnp.linalg.norm(l2norm(x), axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(jnp.mean(rms_norm(jnp.ones(8), x) ** 2, -1), 1, rtol=1e-6)
    np.testing.assert_allclose(l2norm(x), x / np.linalg.norm(x, axis=-1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("norm", [l2norm, lambda x: rms_norm(jnp.ones(8), x)], ids=["l2norm", "rms_norm"])
def test_norms_are_smooth_at_zero(x64, norm):
    """Near it they are a linear map, 1,000 x; a square root's derivative there is not finite."""
    x = jnp.zeros((2, 8))
    slope = 1e3 * np.eye(16).reshape(2, 8, 2, 8)
    np.testing.assert_array_equal(norm(x), 0)
    np.testing.assert_allclose(jax.jacobian(norm)(x), slope, rtol=1e-12)
    np.testing.assert_array_equal(jax.hessian(norm)(x), 0)


@pytest.mark.parametrize("layer", [LinearMemory(16, 2, "linear"), LinearMemory(16, 2), Titans(16, 2, 4)], ids=str)
def test_fixed_projections_start_with_unit_keys_and_a_retention_near_one(layer):
    weights = layer.init_weights(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 20, 16))
    q, k, _, rate, *rest = project_in(weights, x, 2)  # the convolution starts as the identity
    retention = rest[0]
    for vectors in (q, k):
        np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=-1), 1, rtol=1e-4)
    assert retention.min() > 0.98 and 0.2 < rate.mean() < 0.35


def test_self_modifying_memories_start_with_unit_keys_and_values_and_a_retention_near_one():
    layer = SelfModifyingTitans(32, 2, 8)
    weights = layer.init_weights(jax.random.key(0))
    projections = jax.tree.map(lambda w: w[:, :, :-1], broadcast_start(Deep(**weights["start"]), 1))
    x, q = jax.random.normal(jax.random.key(1), (2, 1, 2, 64, 16))
    keys, values, _, strengths = layer.generate(weights, projections, x, {"queries": q}, jnp.full((1, 2, 64), 0.5))
    for vectors in (keys, values):
        np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=-1), 1, rtol=1e-4)
    assert strengths.retain.min() > 0.98


def test_rotary_positions_are_complex_turns(x64):
    """Pairs (x_i, x_{i+4}) as complex numbers; scores depend on the distance of two tokens, and do depend on it."""
    x, at = normal(2, 5, 3, 8), jnp.array([0, 1, 7, 30, 1000])
    pairs, angles = np.asarray(x), np.asarray(at)[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    z = (pairs[..., :4] + 1j * pairs[..., 4:]) * np.exp(1j * angles)[:, None]
    np.testing.assert_allclose(rotate(x, at[None]), np.concatenate([z.real, z.imag], -1), rtol=1e-5, atol=1e-5)
    score = lambda i, j: (rotate(x[:1, :1], jnp.array([[i]])) * rotate(x[:1, 1:2], jnp.array([[j]]))).sum()
    np.testing.assert_allclose(score(3, 9), score(13, 19), rtol=1e-4)
    assert abs(score(3, 9) - score(3, 12)) > 1e-2
