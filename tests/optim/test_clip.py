"""Clipping against optax, and at a gradient of exactly zero."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from nested_jax.optim import clip_by_norm


def test_a_gradient_within_the_norm_is_left_alone():
    """To the bit, up to the norm itself."""
    for size in (0.1, 1.0):
        gradient = {"a": jnp.array([[0.6 * size]]), "b": jnp.array([-0.8 * size, 0.0])}
        chex.assert_trees_all_equal(clip_by_norm(1.0001).update(gradient, None)[0], gradient)


def test_a_zero_gradient_is_clipped_to_zero():
    clip = clip_by_norm(1.0)
    zeros = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}
    clipped, _ = clip.update(zeros, clip.init(zeros))
    chex.assert_trees_all_equal(clipped, zeros)
    large = jax.tree.map(lambda x: x + 7, zeros)
    norm = optax.global_norm(clip.update(large, clip.init(large))[0])
    assert norm == pytest.approx(1.0)
    chex.assert_trees_all_close(clip.update(large, None)[0], optax.clip_by_global_norm(1.0).update(large, None)[0])
