"""`optax.inject_hyperparams` as optax's guides call it: on every rule, with integers, with functions."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rare import cases

from nested_jax import optim
from nested_jax.errors import UserError

REQUIRED = {"learning_rate": 0.1, "max_norm": 1.0, "inner": optax.trace(0.9)}
NOT_RULES = {"DeepMemory", "deep_momentum_start", "linearised", "matrices", "newton_schulz", "proximal"}
NAMES = [name for name in optim.__all__ if name not in NOT_RULES]
PARAMS = {"w": np.array([[1.0, -2.0], [0.5, 3.0], [1.0, 1.0]])}
GRADIENTS = {"w": np.cos(PARAMS["w"])}


def updates(rule, inputs):
    """Of two steps, the state made inside: all hyperparameters in it are traced."""

    @jax.jit
    def run(gradients, state, extra):
        emitted, state = rule.update(gradients, state, PARAMS, **extra)
        return emitted, rule.update(gradients, state, PARAMS, **extra)[0]

    rule = optax.with_extra_args_support(rule)
    return run(GRADIENTS, rule.init(PARAMS), {"inputs": {"w": jnp.eye(3)}} if inputs else {})


@pytest.mark.parametrize("name", cases(NAMES, [name for name in NAMES if not name.startswith("scale_by")]))
def test_every_rule_is_taken(x64, name):
    make = getattr(optim, name)
    own = {key: value for key, value in REQUIRED.items() if key in inspect.signature(make).parameters}
    injected, inputs = optax.inject_hyperparams(make)(**own), "delta_gradient" in name
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(injected.init(PARAMS)) == types(jax.eval_shape(injected.init, PARAMS))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates(injected, inputs), updates(make(**own), inputs)
    )


@pytest.mark.slow
def test_integers_numpy_numbers_and_functions(x64):
    """Integers are traced where they are no sizes; functions are named, as for optax's own."""
    for make, options, static in [
        (optim.m3, {"slow_period": np.int64(2), "steps": 3, "b1": np.float64(0.9)}, ()),
        (optim.generalized_gradient_descent, {"steps": 2, "window": 3}, ()),
        (optim.deep_momentum, {"hidden": 5, "seed": np.array(3), "target": optim.newton_schulz}, "target"),
        (optim.feature_momentum, {"feature_map": jnp.tanh, "decay": np.array(0.5)}, ["feature_map"]),
        (optim.continuum, {"periods": jnp.array(2)}, ()),
    ]:
        injected = optax.inject_hyperparams(make, static)(learning_rate=0.1, **options)
        plain = make(0.1, **options)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates(injected, False), updates(plain, False)
        )


def test_a_rate_in_the_state_is_used():
    rule = optax.inject_hyperparams(optim.delta_momentum)(learning_rate=0.1)
    state = rule.init(PARAMS)
    first, _ = rule.update(GRADIENTS, state, PARAMS)
    state.hyperparams["learning_rate"] = jnp.asarray(0.2)
    np.testing.assert_allclose(rule.update(GRADIENTS, state, PARAMS)[0]["w"], 2 * first["w"], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (optim.feature_momentum, {"feature_map": jnp.tanh}, "feature_map .* is no function.* static_args='feature_map'"),
        (
            optim.nonlinear_momentum,
            {"nonlinearity": jnp.sign},
            "nonlinearity .* is no function.* static_args='nonlinearity'",
        ),
        (optim.deep_momentum, {"target": jnp.sign}, "target .* is no function: .* static_args='target'"),
        (
            optim.deep_momentum,
            {"target": optim.newton_schulz},
            "newton_schulz takes matrices, not the number .* static_args",
        ),
        (optim.m3, {"dimension_numbers": optim.matrices("w")}, "matrices: called with a number: .* static_args"),
        (optim.m3, {"dimension_numbers": jnp.cos}, "dimension_numbers of parameter w are .* static_args"),
        (optim.m3, {"slow_period": 0}, "m3: slow_period .* is out of range: give a whole number"),
        (optim.m3, {"slow_period": 2.0}, "m3: slow_period .* is out of range: give a whole number"),
        (optim.deep_momentum, {"hidden": 5}, "deep_momentum: hidden .* is traced, .* static_args"),
        (
            optim.generalized_gradient_descent,
            {"window": 2},
            "generalized_gradient_descent: window .* is traced, .* static_args",
        ),
    ],
)
def test_what_cannot_be_taken_is_refused_with_the_remedy(make, options, message):
    rule = optax.inject_hyperparams(make)(learning_rate=0.1, **options)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(rule.init, PARAMS) if message.count("traced") else rule.init(PARAMS)


def test_numbers_that_bfloat16_parameters_round_are_refused():
    rule = optax.inject_hyperparams(optim.adam_memory)(0.1)
    with pytest.raises(UserError, match="b2 1.* is out of range: .* bfloat16: hyperparam_dtype"):
        rule.init({"w": jnp.ones(2, jnp.bfloat16)})
