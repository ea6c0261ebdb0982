"""Runs of optax rules for tests: many updates in one compiled scan."""

import jax
import jax.numpy as jnp
import optax


def trajectory(rule, params, gradients, extra=None):
    """(updates, parameters after each update, last state), the first two stacked; gradients is a list of trees.

    Asserts that an update keeps the state's structure, shapes and dtypes, so that a second update compiles nothing. `extra`
    is a list of extra arguments of `update`, one dict a step.
    """
    rule = optax.with_extra_args_support(rule)
    types = lambda tree: jax.tree.map(jax.typeof, tree)
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    @jax.jit
    def run(params, xs):
        def step(carry, x):
            params, state = carry
            updates, after = rule.update(x[0], state, params, **x[1])
            assert types(after) == types(state)
            params = optax.apply_updates(params, updates)
            return (params, after), (updates, params)

        (_, state), (updates, path) = jax.lax.scan(step, (params, rule.init(params)), xs)
        return updates, path, state

    return run(params, (stack(gradients), stack(extra) if extra else {}))


def last(trees):
    """The last of stacked trees."""
    return jax.tree.map(lambda x: x[-1], trees)
