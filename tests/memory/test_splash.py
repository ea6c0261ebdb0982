"""A TPU's attention kernel, interpreted, against XLA's attention; and where it is used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory import attention, splash
from nested_jax.memory.attention import Attention
from nested_jax.parallel.mesh import MeshShape


@pytest.fixture
def interpreted(monkeypatch):
    """Has layers use the kernel, interpreted; the windows of the calls."""
    windows, inner = [], splash.splash

    def read(q, k, v, document, window):
        windows.append(window)
        return inner(q, k, v, document, window, interpret=True)

    monkeypatch.setattr(attention, "splash", read)
    monkeypatch.setattr(splash, "on_tpu", lambda: True)
    return windows


@pytest.mark.parametrize(
    ("window", "bound", "sees"), [(None, None, None), (50, None, 50), (None, 60, 60), (300, None, None)]
)
def test_the_kernel_is_the_same_attention(interpreted, window, bound, sees):
    """Documents that start anywhere, windows, caches of less than the tokens: outputs, caches and gradients."""
    B, T, D = 2, 256, 32
    fused, plain = Attention(D, 2, window), Attention(D, 2, window, "xla")
    weights = fused.init_weights(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    reset = jnp.zeros((B, T), bool).at[0, 100].set(True).at[1, 3].set(True)

    def read(weights, x, layer, reset):
        state, y = layer(weights, layer.init_state(weights, B, bound or T), x, 0, reset=reset)
        return jnp.square(y).sum(), (state, y)

    for given in (reset, None):
        results = [jax.value_and_grad(read, (0, 1), has_aux=True)(weights, x, layer, given) for layer in (fused, plain)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), *results)
    assert interpreted == [sees, sees]


def test_what_the_kernel_cannot_read_is_read_without_it(interpreted):
    """Tokens after others, and in parts of tiles."""
    layer, B = Attention(32, 2), 2
    weights = layer.init_weights(jax.random.key(0))
    state, _ = layer(weights, layer.init_state(weights, B, 512), jnp.ones((B, 200, 32)), 0)
    layer(weights, state, jnp.ones((B, 128, 32)), 200)
    assert not interpreted


@pytest.mark.parametrize(
    ("axes", "tokens", "fits"),
    [
        ((2, 2, 2, 1), 128, True),
        ((1, 1, 1, 1), 128, True),
        ((1, 1, 1, 2), 512, True),
        ((1, 1, 1, 2), 256, False),  # each device has a tile of either half of the queries
        ((2, 4, 1, 1), 512, False),
        ((1, 1, 4, 1), 512, False),
    ],
)
def test_on_a_mesh_rows_heads_and_tokens_are_split_where_it_divides_them(monkeypatch, axes, tokens, fits):
    monkeypatch.setattr(splash, "on_tpu", lambda: True)
    mesh = jax.sharding.AbstractMesh(axes, MeshShape._fields, (jax.sharding.AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh):
        assert splash.fits((4, tokens, 2, 8)) == fits


def test_a_processor_is_no_tpu():
    assert not splash.on_tpu()
