"""Generalized gradient descent: the next weights minimise a given objective plus a given retention."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg
from jax.typing import ArrayLike

from nested_jax.description import Description
from nested_jax.errors import UserError
from nested_jax.numerics import split_scale, vary
from nested_jax.optim._accumulation import refuse_sums
from nested_jax.optim._hyperparameters import (
    POSITIVE,
    as_size,
    check,
    check_count,
    check_functions,
    learning_rate_at,
    next_count,
)
from nested_jax.optim._precision import in_float32
from nested_jax.typing import Array, Float, PyTree


class GeneralizedGradientDescentState(NamedTuple):
    """Steps taken, int32; the weights before the present ones, newest first: leaves (window - 1, ...); None for window 1."""

    count: Array
    past: PyTree
    description = Description("retention of recent weights", "keeps the last ones as they are")


def linearised(weights: PyTree, gradients: PyTree, **extra: PyTree) -> Float[Array, ""]:
    """The objective of gradient descent: the loss to first order.

        <W, g>

    Args:
        weights: W, a tree of arrays.
        gradients: g, of the same shapes.
        extra: extra arguments of `update`, ignored.

    Returns:
        A scalar.

    Source: NL Eq. 31.

    >>> print(linearised(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])))
    11.0
    """
    return jnp.asarray(optax.tree.vdot(weights, gradients))


def proximal(weights: PyTree, recent: PyTree, learning_rate: ArrayLike) -> Float[Array, ""]:
    """The retention of gradient descent: squared distance from the present weights.

        |W - W_t|^2 / (2 eta)

    Args:
        weights: W, a tree of arrays.
        recent: the last weights, newest first: leaves (window, ...).
        learning_rate: eta.

    Returns:
        A scalar.

    Source: NL Eq. 31.

    >>> print(proximal(jnp.array([1.0, 2.0]), jnp.array([[0.0, 0.0]]), 0.5))
    5.0
    """
    present = jax.tree.map(lambda w: w[0], recent)
    return optax.tree.norm(optax.tree.sub(weights, present), squared=True) / (2 * learning_rate)


def scale_by_generalized_gradient_descent(
    learning_rate: optax.ScalarOrSchedule,
    objective: Callable[..., Array] | None = None,
    retention: Callable[[PyTree, PyTree, Array], Array] | None = None,
    *,
    window: int | None = None,
    steps: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """The next weights minimise an objective plus a retention.

        W_{t+1} = argmin_W  objective(W, g) + retention(W, (W_t, ..., W_{t-window+1}), eta)        emits W_t - W_{t+1}

    Solved by Newton's method with conjugate gradients: one step is exact where both are quadratic and convex, as the
    defaults are. With the defaults it is gradient descent.

    Args:
        learning_rate: eta, a number above 0 or a schedule, for the retention.
        objective: (weights, gradients, **extra arguments of `update`) -> a scalar, twice differentiable. None: `linearised`.
        retention: (weights, recent weights with leaves (window, ...), newest first, eta) -> a scalar, twice differentiable.
            None: `proximal`.
        window: number of last weights the retention receives, at least 1. Until there are as many, the first ones repeat.
            None: 1.
        steps: Newton steps from W_t, at least 1.

    Returns:
        A transformation of gradients of any shapes, with state `GeneralizedGradientDescentState`. Its `update` needs params.

    Raises:
        UserError: the learning rate is not finite and above 0, window or steps are below 1, params are missing, or
            gradients of several steps are summed for an objective of extra arguments.

    Source: NL Definition 5.

    >>> rule = scale_by_generalized_gradient_descent(0.5)
    >>> weights = jnp.array([3.0])
    >>> print(rule.update(jnp.array([4.0]), rule.init(weights), weights)[0])  # 0.5 * 4
    [2.]
    """
    check("generalized_gradient_descent", POSITIVE, learning_rate=learning_rate)
    check_count("generalized_gradient_descent", window=1 if window is None else window, steps=steps)
    check_functions("generalized_gradient_descent", objective=objective, retention=retention)
    minimised, retained = objective or linearised, retention or proximal

    def init(params):
        before = 0 if window is None else as_size("generalized_gradient_descent", "window", window) - 1
        past = jax.tree.map(lambda w: jnp.repeat(w[None], before, axis=0), params) if before else None
        return GeneralizedGradientDescentState(jnp.zeros((), jnp.int32), past)

    def update(updates, state, params=None, **extra):
        if params is None:
            raise UserError("generalized_gradient_descent: params are missing: call update(gradients, state, params)")
        if objective is not None and extra:
            refuse_sums("generalized_gradient_descent", f"the objective's {', '.join(extra)}")
        parts = params, updates, state.past
        arrays = [x for x in jax.tree.leaves(extra) if isinstance(x, jax.Array)]
        params, updates, past = vary(parts, *parts, arrays)
        recent = jax.tree.map(lambda w: w[None], params)
        if past is not None:
            recent = jax.tree.map(lambda w, before: jnp.concatenate([w, before]), recent, past)
        start, unravel = ravel_pytree(params)

        def problem(flat):
            weights = unravel(flat)
            rate = learning_rate_at(learning_rate, state.count)
            return minimised(weights, updates, **extra) + retained(weights, recent, rate)

        def newton(_, step):
            flat = start - step
            slope, scale = split_scale(jax.grad(problem)(flat), None)  # conjugate gradients square it
            curvature = lambda v: jax.jvp(jax.grad(problem), (flat,), (v,))[1]
            found = jnp.where(jnp.isnan(slope), slope, cg(curvature, slope)[0])  # which would be zero
            return step + found * scale

        step = jnp.zeros_like(start)  # W_t - W_{t+1}: small steps would be rounded if they were added to weights
        if isinstance(steps, int):
            for i in range(steps):
                step = newton(i, step)
        else:
            step = jax.lax.fori_loop(0, steps, newton, step)
        past = None if past is None else jax.tree.map(lambda w: w[:-1], recent)
        return unravel(step), GeneralizedGradientDescentState(next_count(state.count), past)

    return in_float32(optax.GradientTransformationExtraArgs(init, update))


def generalized_gradient_descent(
    learning_rate: optax.ScalarOrSchedule,
    objective: Callable[..., Array] | None = None,
    retention: Callable[[PyTree, PyTree, Array], Array] | None = None,
    *,
    window: int | None = None,
    steps: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Generalized gradient descent: `scale_by_generalized_gradient_descent`, whose solution becomes the weights.

        W <- argmin_W  objective(W, g) + retention(W, recent weights, eta)

    Args:
        learning_rate, objective, retention, window, steps: as of `scale_by_generalized_gradient_descent`.

    Returns:
        An optimizer of parameters of any shapes. Its `update` needs params.

    Raises:
        UserError: the learning rate is not finite and above 0, window or steps are below 1, or params are missing.

    Source: NL Eq. 31 and Definition 5.

    A retention that also penalises |W|^2 / 2 gives gradient descent with implicit weight decay:

    >>> def decaying(weights, recent, rate):
    ...     return proximal(weights, recent, rate) + optax.tree.norm(weights, squared=True) / 2
    >>> rule = generalized_gradient_descent(0.5, retention=decaying)
    >>> weights = jnp.array([3.0])
    >>> optax.apply_updates(weights, rule.update(jnp.zeros(1), rule.init(weights), weights)[0]).round(3).tolist()
    [2.0]
    """
    rule = scale_by_generalized_gradient_descent(learning_rate, objective, retention, window=window, steps=steps)
    return in_float32(optax.chain(rule, optax.scale(-1.0)))
