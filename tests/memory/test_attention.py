"""Attention against its reference, query by query; caches that grow, are bounded, or slide.

`jax.nn.dot_product_attention` takes its softmax in float32 whatever the inputs are: tolerances are those of float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rare import cases

from nested_jax.memory import attention, reference
from nested_jax.memory.attention import Attention

D, H = 8, 2


def make(window=None, T=13, B=1):
    layer = Attention(D, H, window)
    weights = jax.tree.map(lambda w: w.astype(jnp.float64), layer.init_weights(jax.random.key(0)))
    return layer, weights, jax.random.normal(jax.random.key(1), (B, T, D), jnp.float64)


def read(layer, weights, x, max_length=None, **keywords):
    return layer(weights, layer.init_state(weights, len(x), max_length), x, 0, **keywords)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_layer_is_its_reference(x64, window):
    layer, weights, x = make(window)
    both = lambda f: jax.jit(jax.value_and_grad(lambda w, x: jnp.sum(jnp.sin(f(w, x))), (0, 1)))(weights, x)
    fast, slow = both(lambda w, x: read(layer, w, x)[1]), both(lambda w, x: reference.attention(layer, w, x[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), fast, slow)


@pytest.mark.parametrize("window", cases([None, 5], [5]))
def test_blocks_of_queries_are_the_whole(x64, window, monkeypatch):
    """Long inputs, a block of queries at a time, with a piece left over, after a cache and from none."""
    layer, weights, x = make(window, T=37, B=2)
    reset = jnp.zeros((2, 37), bool).at[1, 17].set(True)

    def in_two(weights, x, reset):
        state, first = read(layer, weights, x[:, :11], reset=reset[:, :11])
        return first, layer(weights, state, x[:, 11:], 11, reset=reset[:, 11:])[1]

    at_once = lambda weights, x, reset: read(layer, weights, x, reset=reset)[1]
    whole = jax.jit(at_once)(weights, x, reset)
    monkeypatch.setattr(attention, "BLOCK", 2)
    np.testing.assert_allclose(jax.jit(lambda *given: at_once(*given))(weights, x, reset), whole, rtol=1e-5, atol=1e-6)
    first, second = jax.jit(in_two)(weights, x, reset)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 20])
def test_pieces_of_keys_are_the_whole(x64, window, monkeypatch):
    """Values, gradients and their own gradients; rows whose first pieces are of other documents, and after a cache."""
    layer, weights, x = make(window, T=37, B=2)
    reset = jnp.zeros((2, 37), bool).at[1, 30].set(True)
    project = jax.random.normal(jax.random.key(5), x.shape, jnp.float64)

    def slope(x):
        loss = lambda x: jnp.sum(jnp.sin(read(layer, weights, x, reset=reset)[1]))
        return jnp.vdot(project, jax.grad(loss)(x))

    def both():
        jax.clear_caches()
        state, first = read(layer, weights, x[:, :11])
        return jax.jit(jax.value_and_grad(slope))(x), first, layer(weights, state, x[:, 11:], 11)[1]

    whole = both()
    monkeypatch.setattr(attention, "BLOCK", 2)
    monkeypatch.setattr(attention, "KEYS", 5)
    attend = attention._in_pieces
    monkeypatch.setattr(attention, "_in_pieces", lambda *given: called.append(given[1].shape[1]) or attend(*given))
    called: list[int] = []
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), both(), whole)
    assert max(called) > 20 and any(n % 5 for n in called)


@pytest.mark.parametrize("window, max_length", [(None, 13), (None, 6), (4, None), (4, 13), (6, 3)])
@pytest.mark.parametrize("pieces", [(1,) * 13, (3, 1, 6, 2, 1), (9, 4)], ids=str)
def test_any_split(x64, window, max_length, pieces):
    """Cache that holds all, ring that overwrites; the position traced."""
    layer, weights, x = make(window, B=2)
    call = lambda weights, now, x, position: jitted(layer)(weights, now, x, jnp.int32(position))
    assert_split(layer, call, weights, x, max_length, pieces)


@pytest.mark.parametrize("pieces", cases([(11, 1, 1), (3, 1, 9)], [(3, 1, 9)]), ids=str)
def test_any_split_of_a_cache_that_grows(x64, pieces):
    """The position concrete."""
    layer, weights, x = make(B=2)
    call = lambda weights, now, x, position: jax.jit(lambda *given: layer(*given, position))(weights, now, x)
    assert_split(layer, call, weights, x, None, pieces)


@functools.cache
def jitted(layer):
    return jax.jit(layer.__call__)


def assert_split(layer, call, weights, x, max_length, pieces):
    """The outputs and the last state are those of one call from a fresh state."""
    state, whole = jax.jit(lambda weights, x: read(layer, weights, x, max_length))(weights, x)
    parts, now = [], layer.init_state(weights, 2, max_length)
    for end, piece in zip(np.cumsum(pieces), pieces, strict=True):
        now, y = call(weights, now, x[:, end - piece : end], int(end - piece))
        parts.append(y)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    close(jnp.concatenate(parts, 1), whole)
    jax.tree.map(close, now, state)


def test_a_bound_is_a_window(x64):
    """A cache of six tokens reads what a window of six does."""
    layer, weights, x = make()
    bounded = jax.jit(lambda: read(layer, weights, x, 6)[1])()
    windowed = jax.jit(lambda: read(Attention(D, H, 6), weights, x)[1])()
    np.testing.assert_allclose(bounded, windowed, rtol=1e-12)


def test_reset_starts_a_document(x64):
    """Tokens before it are not seen. Rotary positions are relative, so that the rest equals a fresh call."""
    layer, weights, x = make(B=2)
    call = jax.jit(lambda x, reset=None: read(layer, weights, x, reset=reset)[1])
    y = call(x, jnp.zeros((2, 13), bool).at[1, 5].set(True))
    np.testing.assert_allclose(y[0], call(x)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y[1, 5:], call(x[1:, 5:])[0], rtol=1e-5, atol=1e-6)


def test_gradients_are_finite_at_zero(x64):
    layer, weights, x = make()
    loss = lambda x: jnp.sum(read(layer, weights, x)[1] ** 2)
    assert jnp.isfinite(jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2)))(0 * x)).all()


def test_bfloat16(x64):
    layer, weights, x = make()
    weights = jax.tree.map(lambda w: w.astype(jnp.float32), weights)
    state, y = read(layer, weights, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and state.keys.dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), read(layer, weights, x.astype(jnp.float32))[1], atol=0.04)
