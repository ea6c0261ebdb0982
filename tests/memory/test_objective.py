"""Attentional biases: errors are the derivatives of losses, smooth where an error is zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.errors import UserError
from nested_jax.memory import objective
from nested_jax.memory.linear import LinearMemory
from nested_jax.memory.recurrence import Gates, MemoryState, chunked, read_transposed, tokenwise, write

OBJECTIVES = {
    "dot product": objective.dot_product(),
    "l2": objective.l2(),
    "lp 1": objective.lp(1.0),
    "lp 1.5": objective.lp(1.5),
    "lp 3": objective.lp(3.0),
    "huber, far": objective.huber(0.1),
    "huber, near": objective.huber(10.0),
}
rng = np.random.default_rng(0)
y, v = rng.normal(size=(2, 5, 4))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_error_is_the_derivative_of_the_loss(x64, name):
    loss, error, _ = OBJECTIVES[name]
    expected = jax.grad(lambda y: loss(y, v).sum())(jnp.asarray(y))
    np.testing.assert_allclose(error(y, v), expected, rtol=1e-12)
    assert loss(jnp.asarray(y), v).shape == (5,)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_derivatives_are_finite_where_the_error_is_zero(name):
    for function in OBJECTIVES[name][:2]:
        for derivative in (jax.jacobian, lambda f: jax.jacobian(jax.jacobian(f))):
            assert jnp.isfinite(jax.jit(derivative(lambda y, f=function: f(y, y[::-1])))(jnp.ones(3))).all()


def test_values_by_hand(x64):
    e = np.array([[3.0, -4.0], [0.3, 0.4]])
    np.testing.assert_allclose(objective.lp(3.0).loss(e, 0 * e), (np.abs(e) ** 3).sum(-1) / 3, rtol=1e-4)
    np.testing.assert_allclose(objective.huber(2.0).loss(e, 0 * e), [2 * 5 - 2, 0.125], rtol=1e-12)
    np.testing.assert_allclose(objective.huber(2.0).error(e, 0 * e), [[1.2, -1.6], [0.3, 0.4]], rtol=1e-12)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="lp: power 0.5 must be at least 1"):
        objective.lp(0.5)
    with pytest.raises(UserError, match="huber: threshold 0 must be positive"):
        objective.huber(0)


def test_ojas_rule_descends_on_its_objective(x64):
    """One token of the layer's recurrence, of M^T, is one step of gradient descent."""
    memory, key, value = (jnp.asarray(rng.normal(size=size)) for size in ((4, 3), 3, 4))
    gates = LinearMemory(8, 2, "oja").gates(jnp.full(1, 0.3), jnp.ones(1))
    state, _ = chunked(MemoryState(memory.T), value[None], -key[None], gates, None)
    expected = memory - 0.3 * jax.grad(objective.oja)(memory, key, value)
    np.testing.assert_allclose(state.weights.T, expected, rtol=1e-12)


def test_a_read_from_the_other_side_is_of_the_transposed_memory(x64):
    """Token by token; values and gradients."""
    C, K, V = 9, 3, 4
    x, errors, queries = rng.normal(size=(C, K)) / 2, rng.normal(size=(C, V)), rng.normal(size=(C, V))
    gates = Gates(*rng.uniform(0, 0.5, (2, C)), rng.uniform(0.5, 1, C))

    def slow(state, x, errors, gates, queries):
        outputs = []
        for t in range(C):
            cut = jax.tree.map(lambda g: g[t : t + 1], gates)  # noqa: B023
            state, _ = tokenwise(state, x[t : t + 1], errors[t : t + 1], cut, None)
            outputs.append(state.weights.T @ queries[t])
        return jnp.stack(outputs)

    fast = lambda state, x, errors, gates, queries: read_transposed(write(state, x, errors, gates), queries)
    arguments = jax.tree.map(jnp.asarray, (MemoryState(rng.normal(size=(V, K))), x, errors, gates, queries))
    both = [jax.jit(jax.value_and_grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), range(5)))(*arguments) for f in (slow, fast)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12), *both)
