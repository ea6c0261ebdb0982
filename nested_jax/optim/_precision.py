"""Rules in float32, whatever the dtype of gradients and parameters."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from nested_jax.errors import UserError
from nested_jax.numerics import upcast
from nested_jax.paths import path_name
from nested_jax.typing import Array


def in_float32(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A rule that is given gradients and parameters in float32, or float64 with such gradients.

    So its state and sums are. Updates are cast to the gradients' dtypes at the end, to its largest number where they are
    larger. Its `init` raises UserError for a parameter that is no float.
    """
    rule = optax.with_extra_args_support(rule)

    @functools.wraps(rule.init)
    def init(params):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if not jnp.issubdtype(dtype := jnp.result_type(leaf), jnp.inexact):
                remedy = "make it a float, or leave it out by optax.masked"
                raise UserError(f"parameter {path_name(path)} is {dtype.name}, which has no gradient: {remedy}")
        return rule.init(upcast(params))

    @functools.wraps(rule.update)
    def update(updates, state, params=None, **extra):
        emitted, state = rule.update(upcast(updates), state, upcast(params), **extra)
        return jax.tree.map(_cast, emitted, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def at_rate(
    rule: optax.GradientTransformation, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """A rule, then minus the learning rate; updates are cast to the gradients' dtypes after both."""
    return in_float32(optax.chain(rule, optax.scale_by_learning_rate(learning_rate)))


def finite_adam(adam: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """optax's Adam with finite updates of the largest gradients too.

    Where squares overflow Adam's update is zero, unless a first moment over its correction overflows too; gradients are cut
    to what squared still overflows.
    """
    adam = optax.with_extra_args_support(adam)

    def update(updates, state, params=None, **extra):
        largest = lambda g: float(jnp.finfo(g.dtype).max) ** 0.75
        return adam.update(jax.tree.map(lambda g: jnp.clip(g, -largest(g), largest(g)), updates), state, params, **extra)

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _cast(x: Array, like: Array) -> Array:
    dtype = jnp.result_type(like)
    if x.dtype == dtype:
        return x
    largest = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x).astype(dtype)
