"""An MLP block and a linear-attention block differ only in the level of one weight (NL section 6; AdaTransformer)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_jax import Level, describe, run
from nested_jax.memory.recurrence import Gates, MemoryState, tokenwise

rng = np.random.default_rng(0)
WEIGHTS = {name: rng.normal(size=(5, 5)) / 5**0.5 for name in "QKVM"}
x = rng.normal(size=(12, 5))


def block(weights, rate):
    """y_t = M silu(Q x_t), where M takes a step of some rate on -<M k_t, v_t> before it is read."""

    def step(M, x, slower):
        q, k, v = (weights[name] @ x[0] for name in "QKV")
        M = M - rate * jax.grad(lambda M: -jnp.dot(M @ jax.nn.silu(k), v))(M)
        return M, M @ jax.nn.silu(q)

    return Level(lambda slower: jnp.asarray(weights["M"]), step, period=1, name="M")


def loss(weights, form):
    return jnp.sum(jnp.sin(form(weights)))


def assert_same(one, other):
    weights = jax.tree.map(jnp.asarray, WEIGHTS)
    both = [jax.jit(jax.value_and_grad(loss), static_argnums=1)(weights, form) for form in (one, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), *both)


def test_a_weight_that_never_moves_makes_an_mlp(x64):
    assert_same(
        lambda w: run(block(w, 0.0), None, jnp.asarray(x))[1],
        lambda w: jax.nn.silu(x @ w["Q"].T) @ w["M"].T,
    )


def test_the_same_weight_moved_at_every_token_makes_linear_attention(x64):
    """As the sum over pairs of tokens, and as the recurrence of linear memories; values and all gradients."""

    def pairs(w):
        q, k, v = jax.nn.silu(x @ w["Q"].T), jax.nn.silu(x @ w["K"].T), x @ w["V"].T
        return q @ w["M"].T + jnp.tril(q @ k.T) @ v

    def recurrence(w):
        gates = Gates(jnp.ones(len(x)), jnp.zeros(len(x)), jnp.ones(len(x)))
        k, q = (jax.nn.silu(x @ w[name].T) for name in "KQ")
        return tokenwise(MemoryState(w["M"]), k, -(x @ w["V"].T), gates, q)[1]

    at_every_token = lambda w: run(block(w, 1.0), None, jnp.asarray(x))[1]
    assert_same(at_every_token, pairs)
    assert_same(at_every_token, recurrence)


def test_the_picture_differs_in_that_weight_alone():
    """Three weights are moved by the optimizer in both; the fourth with them, or at every token."""
    fixed = {name: WEIGHTS[name] for name in "QKV"}
    mlp = describe(({**fixed, "M": WEIGHTS["M"]}, optax.sgd(0.1)), tokens_per_step=8)
    attention = describe((block(WEIGHTS, 1.0), fixed, optax.sgd(0.1)), tokens_per_step=8)
    assert [(c.name, c.updates) for c in mlp.components] == [("parameters", "1/8 a token")]
    assert [(c.name, c.updates) for c in attention.components] == [("M", "1 a token"), ("parameters", "1/8 a token")]
    assert mlp.parameters - attention.parameters == WEIGHTS["M"].size
    assert (mlp.levels, attention.levels) == (1, 2)
