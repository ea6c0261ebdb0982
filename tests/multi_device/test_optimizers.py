"""Every transformation on sharded parameters: memories lie where their parameters lie, and stay; nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rare import cases

from nested_jax import optim

SPECS = {"dense": {"kernel": P("data", "model"), "bias": P("model")}, "scale": P()}
SHAPES = {"dense": {"kernel": (8, 4), "bias": (4,)}, "scale": ()}
RULES = {
    "momentum": optim.momentum,
    "preconditioned_momentum": optim.preconditioned_momentum,
    "feature_momentum": optim.feature_momentum,
    "delta_momentum": optim.delta_momentum,
    "deep_momentum": optim.deep_momentum,
    "nonlinear_momentum": optim.nonlinear_momentum,
    "adam_memory": optim.adam_memory,
    "adagrad_memory": optim.adagrad_memory,
    "adagrad_memory, full": lambda rate: optim.adagrad_memory(rate, form="full"),
    "delta_gradient_descent": optim.delta_gradient_descent,
    "generalized_gradient_descent": lambda rate: optim.generalized_gradient_descent(rate, window=2),
    "m3": lambda rate: optim.m3(rate, slow_period=2),
    "continuum": lambda rate: optim.continuum(rate, periods=2),
}


def tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(size=s), SHAPES, is_leaf=lambda s: isinstance(s, tuple))


def updates(rule, place, spread, inputs):
    """Parameters after four updates; the state before, after the first and after the last; how often it compiled."""
    rule = optax.with_extra_args_support(rule)
    params, extra = place(tree(0)), {} if inputs is None else {"inputs": {"dense/kernel": inputs}}

    def update(gradient, state, params):
        moved, state = rule.update(gradient, state, params, **extra)
        return optax.apply_updates(params, moved), state

    update, states = jax.jit(update), [jax.tree.map(spread, rule.init(params))]
    for seed in range(1, 5):
        params, state = update(place(tree(seed)), states[-1], params)
        states.append(state)
    return params, states[0], states[1], states[-1], update._cache_size()


@pytest.mark.parametrize("name", cases(RULES, RULES.keys() - {"adagrad_memory, full"}))
def test_state_lies_where_parameters_lie(x64, name):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=lambda s: isinstance(s, P))
    inputs = jnp.asarray(np.random.default_rng(9).normal(size=(6, 8))) if name == "delta_gradient_descent" else None
    alone, *_ = updates(RULES[name](0.1), lambda t: jax.tree.map(jnp.asarray, t), lambda x: x, inputs)
    everywhere = lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, NamedSharding(mesh, P()))
    params, begun, settled, state, compiled = updates(
        RULES[name](0.1), lambda t: jax.device_put(t, where), everywhere, inputs
    )

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), params, alone)
    jax.tree.map(lambda p, s: p.sharding.is_equivalent_to(s, p.ndim) or pytest.fail(f"{p.sharding}"), params, where)
    if name == "deep_momentum":  # its MLPs, of shapes of their own, find their place in the first update
        assert compiled == 2
        begun = settled
    else:
        assert compiled == 1
    held = 0
    for (path, before), after in zip(jax.tree_util.tree_leaves_with_path(begun), jax.tree.leaves(state), strict=True):
        told = f"{jax.tree_util.keystr(path)}: {before.sharding}, then {after.sharding}"
        assert after.sharding.is_equivalent_to(before.sharding, after.ndim), told
        if after.shape[-2:] == SHAPES["dense"]["kernel"]:
            own = P(*[None] * (after.ndim - 2), *SPECS["dense"]["kernel"])
            assert after.sharding.is_equivalent_to(NamedSharding(mesh, own), after.ndim), told
            held += 1
    assert held or name in ("delta_gradient_descent", "deep_momentum", "adagrad_memory, full")


@pytest.mark.parametrize("name", cases(RULES, ["momentum", "m3", "nonlinear_momentum", "delta_gradient_descent"]))
def test_in_a_users_shard_map(x64, name):
    """A model of its own on each device, its state made there, is that model alone; with a mean gradient all stay equal."""
    mesh, rule = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)), optax.with_extra_args_support(RULES[name](0.1))
    draw = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape))
    params = {"kernel": draw(0, 4, 3, 2), "bias": draw(1, 4, 2)}
    x = draw(2, 4, 5, 3)

    def steps(params, x, mean=lambda tree: tree):
        state, extra = rule.init(params), {"inputs": {"kernel": x}} if name == "delta_gradient_descent" else {}
        loss = lambda params: jnp.mean(jnp.sin(x @ params["kernel"] + params["bias"][None]))
        for _ in range(2):
            updates, state = rule.update(mean(jax.grad(loss)(params)), state, params, **extra)
            params = optax.apply_updates(params, updates)
        return params

    close = lambda a, b: jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), a, b)
    at = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
    each = lambda params, x: jax.tree.map(lambda leaf: leaf[None], steps(at(params, 0), x[0]))
    own = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(params, x)
    alone = jax.jit(steps)
    for i in (0, 3):
        close(at(own, i), alone(at(params, i), x[i]))
    if name == "delta_gradient_descent":
        return  # its inputs are those of all devices, which no mean makes equal
    split = lambda params, x: steps(jax.lax.pcast(params, "data", to="varying"), x[0], lambda g: jax.lax.pmean(g, "data"))
    equal = jax.jit(jax.shard_map(split, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")))(at(params, 0), x)
    close(jax.tree.map(lambda leaf: leaf[: len(leaf) // 4], equal), alone(at(params, 0), x.reshape(-1, 3)))
