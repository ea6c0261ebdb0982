"""Every rule in a training step under vmap and in a program exported for any batch size, against the same step under jit.

In a user's own `jax.shard_map` they are tested on four devices, in `multi_device/test_optimizers.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from rare import cases
from rule_runs import RULES

DEFAULT = ("momentum", "delta momentum", "deep momentum", "delta gradient descent", "m3")


def training_step(rule, name):
    """(params, state, x, y) -> the same after one step of a linear layer."""
    rule = optax.with_extra_args_support(rule)

    def loss(params, x, y):
        return jnp.mean((x @ params["kernel"] + params["bias"][None] - y) ** 2)

    def step(params, state, x, y):
        gradients = jax.grad(loss)(params, x, y)
        extra = {"inputs": {"kernel": x}} if name == "delta gradient descent" else {}
        updates, state = rule.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("name", cases(RULES, DEFAULT))
def test_a_training_step(name):
    rule = RULES[name](0.1)
    step, x, y = training_step(rule, name), numbers(0, 2, 6, 4), numbers(1, 2, 6, 3)
    params = {"kernel": numbers(2, 2, 4, 3), "bias": numbers(3, 2, 3)}  # of two members of a population
    jitted, first = jax.jit(step), lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    close = lambda a, b: jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), a, b)

    member = first(params)
    carry = member, rule.init(member)
    for _ in range(2):
        carry = jitted(*carry, x[0], y[0])
    assert jitted._cache_size() == 1

    population = params, jax.vmap(rule.init)(params)
    many = jax.jit(jax.vmap(step))
    for _ in range(2):
        population = many(*population, x, y)
    close(first(population), carry)

    (size,) = export.symbolic_shape("b")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (member, rule.init(member)))
    batch = [jax.ShapeDtypeStruct((size, width), jnp.float32) for width in (4, 3)]
    program = export.export(jitted)(*shapes, *batch)
    exported = member, rule.init(member)
    for _ in range(2):
        exported = program.call(*exported, x[0], y[0])
    close(exported, carry)
