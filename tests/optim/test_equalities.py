"""Rules that equal optax's own under some options: 100 steps on a small network, with a schedule as learning rate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax import optim

RATE = optax.cosine_decay_schedule(0.05, 120)


def network(params, x):
    h = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return h @ params["second"]["kernel"] + params["second"]["bias"][None]


def start():
    rng = np.random.default_rng(0)
    layer = lambda rows, columns: {"kernel": rng.normal(size=(rows, columns)) / rows**0.5, "bias": np.zeros(columns)}
    return jax.tree.map(jnp.asarray, {"first": layer(5, 8), "second": layer(8, 3)})


@functools.cache
def trajectory(rule, steps=100):
    """Parameters after every step, with another batch at each."""
    rng = np.random.default_rng(1)
    xs, ys = jnp.asarray(rng.normal(size=(steps, 16, 5))), jnp.asarray(rng.normal(size=(steps, 16, 3)))

    @jax.jit
    def run(params):
        def step(carry, batch):
            params, state = carry
            gradients = jax.grad(lambda p: jnp.mean((network(p, batch[0]) - batch[1]) ** 2))(params)
            updates, state = rule.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, rule.init(params)), (xs, ys))[1]

    return run(start())


FIRST = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "first", params)
OPTIONS = {"nesterov": False, "consistent_rms": 0.2, "weight_decay": 0.1, "weight_decay_mask": FIRST}
VECTORS = {"vectors": optax.adamw(0.02, b1=0.8, weight_decay=0.3)}  # as optax's Muon would have them
MUON = optax.contrib.muon(RATE, beta=0.9, **OPTIONS, adam_b1=0.8, adam_weight_decay=0.3, adam_learning_rate=0.02)
MOMENTUM, ADAM, SGD = optim.momentum(RATE), optax.adam(RATE), optax.sgd(RATE)  # each compiled once
PLAIN_MUON = optax.contrib.muon(RATE)
KERNELS = lambda params: jax.tree.map(lambda w: w.ndim == 2, params)
EQUAL = {
    "momentum": lambda: (optim.momentum(RATE, 0.9), optax.sgd(RATE, momentum=0.9)),
    "momentum, nesterov": lambda: (optim.momentum(RATE, 0.8, nesterov=True), optax.sgd(RATE, momentum=0.8, nesterov=True)),
    "preconditioned momentum with the identity": lambda: (
        optim.preconditioned_momentum(RATE, optax.identity()),
        MOMENTUM,
    ),
    "preconditioned momentum": lambda: (
        optim.preconditioned_momentum(RATE),
        optax.chain(optax.scale_by_rms(), optax.trace(0.9), optax.scale_by_learning_rate(RATE)),
    ),
    "preconditioned momentum, nesterov": lambda: (
        optim.preconditioned_momentum(RATE, decay=0.8, nesterov=True),
        optax.chain(optax.scale_by_rms(), optax.trace(0.8, nesterov=True), optax.scale_by_learning_rate(RATE)),
    ),
    "feature momentum with the identity": lambda: (optim.feature_momentum(RATE, lambda g: g), MOMENTUM),
    "delta momentum without erasure": lambda: (optim.delta_momentum(RATE, erase=0.0), MOMENTUM),
    "non-linear momentum is muon": lambda: (optim.nonlinear_momentum(RATE), PLAIN_MUON),
    "muon with options": lambda: (
        optim.nonlinear_momentum(RATE, decay=0.9, nesterov=False, consistent_rms=0.2, weight_decay=0.1),
        optax.contrib.muon(RATE, beta=0.9, nesterov=False, consistent_rms=0.2, weight_decay=0.1),
    ),
    "muon with a mask and a rule for vectors": lambda: (
        optim.nonlinear_momentum(RATE, decay=0.9, **OPTIONS, **VECTORS),
        MUON,
    ),
    "m3 without its slow memory, with options": lambda: (
        optim.m3(RATE, b1=0.9, slow_weight=0.0, second_moment=False, **OPTIONS, **VECTORS),
        MUON,
    ),
    "non-linear momentum on leaves, with a decay of some": lambda: (
        optim.nonlinear_momentum(
            RATE, jnp.sign, average=False, nesterov=False, on="leaves", weight_decay=0.1, weight_decay_mask=FIRST
        ),
        optax.chain(
            optax.trace(0.95),
            optax.scale_by_sign(),
            optax.add_decayed_weights(0.1, FIRST),
            optax.scale_by_learning_rate(RATE),
        ),
    ),
    "non-linear momentum with the identity": lambda: (
        optim.nonlinear_momentum(RATE, lambda m: m, 0.9, average=False, nesterov=False, on="leaves"),
        MOMENTUM,
    ),
    "adam memory": lambda: (optim.adam_memory(RATE), ADAM),
    "adam memory, with options": lambda: (
        optim.adam_memory(RATE, 0.8, 0.99, eps=0.1),
        optax.adam(RATE, 0.8, 0.99, eps=0.1),
    ),
    "adagrad memory": lambda: (optim.adagrad_memory(RATE), optax.adagrad(RATE, initial_accumulator_value=0.0, eps=0.0)),
    "m3 without its slow memory": lambda: (optim.m3(RATE, slow_weight=0.0, second_moment=False), PLAIN_MUON),
    "continuum, period 1": lambda: (optim.scale_by_continuum(optax.adam(RATE), 1), ADAM),
    "continuum, period 7": lambda: (
        optim.scale_by_continuum(optax.adam(RATE), 7),
        optax.MultiSteps(optax.adam(RATE), 7, use_grad_mean=False, accumulator_dtype=jnp.float64),
    ),
    "continuum, of what it is without an inner rule": lambda: (optim.continuum(RATE, 1), ADAM),
    "continuum, alias": lambda: (
        optim.continuum(RATE, 1, inner=optax.trace(0.9)),
        MOMENTUM,
    ),
    "deep momentum that does not learn": lambda: (
        optax.partition({True: optim.deep_momentum(RATE, rate=0.0), False: optax.sgd(RATE)}, KERNELS),
        SGD,
    ),
    "generalized gradient descent": lambda: (optim.generalized_gradient_descent(RATE), SGD),
}


@pytest.mark.parametrize("case", EQUAL)
def test_equal(x64, case):
    own, theirs = (trajectory(rule) for rule in EQUAL[case]())
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(own), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9, err_msg=jax.tree_util.keystr(path))
        assert jnp.max(jnp.abs(a[-1] - a[0])) > 1e-3
