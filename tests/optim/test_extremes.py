"""Gradients of any finite size, in three precisions, with parameters of no size beside them: updates are finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rare import cases
from rule_runs import RULES

from nested_jax import optim

DTYPES = {"single": jnp.float32, "half": jnp.float16, "brain": jnp.bfloat16}
SIZES = ("ordinary", "ordinary", "largest", "largest again", "mixed", "square overflows", "tiny", "zero")


def gradients(size, dtype):
    """A matrix and a vector; the same ordinary one in all dtypes, below the root of the least float16."""
    largest, rng = float(jnp.finfo(dtype).max), np.random.default_rng(0)
    signs = np.sign(rng.normal(size=(4, 3)))
    mixed = np.array([[largest, 1, -largest], [0, 1e-30, largest], [-largest, -1e-4, 0], [largest, largest, largest]])
    values = {
        "ordinary": 1e-4 * rng.normal(size=(4, 3)).astype(np.float16),
        "largest": largest * np.ones((4, 3)),
        "largest again": largest * signs,
        "mixed": mixed,
        "square overflows": largest**0.75 * signs,
        "tiny": 1e-30 * signs,
        "zero": 0 * signs,
    }[size]
    values = jnp.asarray(values, jnp.float16 if size == "ordinary" else dtype).astype(dtype)
    return {"kernel": values, "bias": values[1]}


def tree(size):
    empty = {"rows": jnp.ones((0, 4)), "columns": jnp.ones((4, 0)), "vector": jnp.ones(0)}
    return {name: gradients(size, dtype) for name, dtype in DTYPES.items()} | {"empty": empty}


@pytest.mark.parametrize(
    "name",
    cases(RULES, RULES.keys() - {"adam memory, sums", "m3, sums", "deep momentum, l2", "delta momentum, preconditioned"}),
)
def test_finite_gradients_give_finite_updates(name):
    """And float16 gradients are in float32 before any part of a rule sees them."""
    rule, params = RULES[name](0.1), jax.tree.map(jnp.ones_like, tree("zero"))
    rule = optax.with_extra_args_support(rule)
    inputs = {"single/kernel": jnp.eye(4), "empty/rows": jnp.ones((2, 0))}
    extra = {"inputs": inputs} if name == "delta gradient descent" else {}
    update, state = jax.jit(rule.update), jax.jit(rule.init)(params)
    for step, size in enumerate(SIZES):
        updates, state = update(tree(size), state, params, **extra)
        for (path, x), p in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True):
            assert jnp.isfinite(x).all() and (x.shape, x.dtype) == (p.shape, p.dtype), (size, jax.tree_util.keystr(path))
        assert not any(jnp.isnan(x).any() for x in jax.tree.leaves(state)), size
        floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert all(x.dtype == jnp.float32 for x in floats)
        if step == 1 and name != "delta gradient descent":  # an update of every rule, those of two steps too
            for key in ("bias",) if "deep" in name else ("bias", "kernel"):  # starts differ from leaf to leaf
                expected, half = updates["single"][key], updates["half"][key]
                assert (half != 0).any() or not expected.astype(jnp.float16).any()
                np.testing.assert_allclose(half, expected.astype(jnp.float16), rtol=2e-3, atol=1e-7)
    assert update._cache_size() == 1


EQUAL = {
    "momentum": (optim.momentum(0.1), optax.sgd(0.1, 0.9)),
    "preconditioned momentum": (optim.scale_by_preconditioned_momentum(decay=0.0), optax.scale_by_rms()),
    "muon": (optim.nonlinear_momentum(0.1), optax.contrib.muon(0.1)),
    "adam": (optim.adam_memory(0.1), optax.adam(0.1)),
    "adagrad": (optim.adagrad_memory(0.1), optax.adagrad(0.1, initial_accumulator_value=0.0, eps=0.0)),
    "clip": (optim.clip_by_norm(1.0), optax.clip_by_global_norm(1.0)),
    "descent": (optim.generalized_gradient_descent(0.1), optax.sgd(0.1)),
    "continuum": (optim.continuum(0.1, 1), optax.adam(0.1)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_to_optax_where_that_is_finite(name):
    """From sizes whose squares vanish to those whose squares overflow; Muon, which enlarges roundings, in float64."""
    with jax.enable_x64(name == "muon"):
        dtype = jnp.float64 if name == "muon" else jnp.float32
        params = jax.tree.map(jnp.ones_like, gradients("zero", dtype))
        states, compared = [rule.init(params) for rule in EQUAL[name]], 0
        both = lambda g, states: [r.update(g, state, params) for r, state in zip(EQUAL[name], states, strict=True)]
        update = jax.jit(both)
        for size in ("ordinary", "zero", "tiny", "square overflows", "mixed", "largest"):
            (own, first), (theirs, second) = update(gradients(size, dtype), states)
            states = [first, second]
            for x, y in zip(jax.tree.leaves(own), jax.tree.leaves(theirs), strict=True):
                finite = np.isfinite(y)
                assert np.isfinite(x).all()
                np.testing.assert_allclose(x[finite], y[finite], rtol=2e-5, atol=1e-9, err_msg=size)
                compared += finite.sum()
        assert compared >= 4 * 15


def test_a_largest_norm_whose_square_overflows_clips():
    """As optax, to zero where the norm overflows too."""
    g = {"a": jnp.array([3e25, 4e25]), "b": jnp.array([1.0])}
    own, theirs = optim.clip_by_norm(1e20), optax.clip_by_global_norm(1e20)
    jax.tree.map(np.testing.assert_array_equal, own.update(g, None)[0], theirs.update(g, None)[0])


@functools.partial(jax.jit, static_argnums=0)
def first_update(rule, g):
    return rule.update(g, rule.init(g), g)[0]


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_directions_are_right_at_any_size(size):
    """Of rules that are not optax's: a scaled gradient's update is the scaled one's."""
    g = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    for rule in (optim.scale_by_deep_momentum(), optim.scale_by_delta_momentum()):
        np.testing.assert_allclose(first_update(rule, g * size) / size, first_update(rule, g), rtol=1e-5)
    orthogonal = lambda g: optim.newton_schulz(g, 10, form="gradient")
    np.testing.assert_allclose(orthogonal(g * size), orthogonal(g), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(optim.newton_schulz((300 * g).astype(jnp.float16)), optim.newton_schulz(g), atol=0.02)


@pytest.mark.parametrize("name", cases(RULES, ["momentum", "adam memory", "m3", "generalized gradient descent"]))
def test_a_gradient_that_is_no_number_is_not_hidden(name):
    """As of optax's rules: what it is written to is no number from then on."""
    rule = optax.with_extra_args_support(RULES[name](0.1))
    params = {"kernel": jnp.ones((4, 3))}
    extra = {"inputs": {"kernel": jnp.eye(4)}} if name == "delta gradient descent" else {}
    update, state = jax.jit(rule.update), rule.init(params)
    for number in (1.0, jnp.nan, 1.0):
        updates, state = update({"kernel": params["kernel"].at[0, 0].set(number)}, state, params, **extra)
        params = optax.apply_updates(params, updates)
    assert jnp.isnan(params["kernel"]).any()
