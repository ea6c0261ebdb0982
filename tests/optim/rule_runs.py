"""Every rule by name, and runs of rules for tests: many updates in one compiled scan."""

import functools

import jax
import jax.numpy as jnp
import optax

from nested_jax import optim

RULES = {
    "momentum": optim.momentum,
    "preconditioned momentum": optim.preconditioned_momentum,
    "feature momentum": optim.feature_momentum,
    "delta momentum": optim.delta_momentum,
    "delta momentum, preconditioned": functools.partial(optim.delta_momentum, preconditioner=optax.scale_by_rms()),
    "deep momentum": optim.deep_momentum,
    "deep momentum, l2": functools.partial(optim.deep_momentum, objective="l2", target=optim.newton_schulz, scale="rms"),
    "non-linear momentum": optim.nonlinear_momentum,
    "adam memory": optim.adam_memory,
    "adam memory, sums": functools.partial(optim.adam_memory, average=False, penalty=0.1),
    "adagrad memory": optim.adagrad_memory,
    "adagrad memory, full": functools.partial(optim.adagrad_memory, form="full"),
    "delta gradient descent": optim.delta_gradient_descent,
    "generalized gradient descent": functools.partial(optim.generalized_gradient_descent, window=2),
    "m3": functools.partial(optim.m3, slow_period=2),
    "m3, sums": functools.partial(optim.m3, slow_period=2, average=False),
    "continuum": functools.partial(optim.continuum, periods=2),
}
VARIANTS = ("delta momentum, preconditioned", "deep momentum, l2", "adam memory, sums", "m3, sums")  # of other rules


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
