"""Generalised gradient descent: the next weights minimise an objective and a retention, both given."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from nested_jax.description import Description
from nested_jax.errors import UserError
from nested_jax.numerics import upcast
from nested_jax.optim._hyperparameters import check, check_period, rate_at
from nested_jax.typing import Array, PyTree


class GeneralizedGradientDescentState(NamedTuple):
    """Steps taken, and the weights before the present ones, newest first: leaves (window - 1, ...), float32 or finer."""

    count: Array
    past: PyTree
    description = Description("retention of recent weights", "keeps the last ones as they are")


def linearised(weights: PyTree, gradients: PyTree, **extra: PyTree) -> Array:
    """The loss to first order, <W, g>: the objective of gradient descent (NL Eq. 31)."""
    return optax.tree.vdot(weights, gradients)


def proximal(weights: PyTree, recent: PyTree, learning_rate: Array) -> Array:
    """|W - W_t|^2 / (2 eta): the retention of gradient descent (NL Eq. 31)."""
    last = jax.tree.map(lambda w: w[0], recent)
    return optax.tree.norm(optax.tree.sub(weights, last), squared=True) / (2 * learning_rate)


def scale_by_generalized_gradient_descent(
    learning_rate: optax.ScalarOrSchedule,
    objective: Callable[..., Array] = linearised,
    retention: Callable[[PyTree, PyTree, Array], Array] = proximal,
    *,
    window: int = 1,
    steps: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """The next weights as the solution of a problem of their own (NL Def. 5).

        W+ = argmin_W  objective(W, g) + retention(W, recent W, eta)        emits W_t - W+

    Solved by Newton's method with conjugate gradients: one step is exact where both are quadratic and convex, as they are
    by default, where W+ is the step of gradient descent.

    Args:
        learning_rate: eta, a number or a schedule, above 0; the retention's.
        objective: (weights, gradients, **extra arguments of `update`) -> a scalar, differentiable twice.
        retention: (weights, recent weights with leaves (window, ...), newest first, eta) -> a scalar, differentiable twice.
        window: how many of the last weights the retention sees; before there are so many, the first ones again.
        steps: of Newton's method, from W_t.

    Raises:
        UserError: the learning rate is not finite and above 0, there is no window or step, or params are missing.
    """
    check("generalized_gradient_descent", learning_rate=learning_rate)
    if not callable(learning_rate) and not isinstance(learning_rate, jax.core.Tracer) and learning_rate <= 0:
        raise UserError(f"generalized_gradient_descent: learning_rate {learning_rate} must be above 0")
    check_period("generalized_gradient_descent", window=window, steps=steps)

    def init(params):
        past = jax.tree.map(lambda w: jnp.repeat(w[None], window - 1, axis=0), upcast(params))
        return GeneralizedGradientDescentState(jnp.zeros((), jnp.int32), past)

    def update(updates, state, params=None, **extra):
        if params is None:
            raise UserError("generalized_gradient_descent: params are missing: call update(gradients, state, params)")
        now, gradients = upcast(params), upcast(updates)
        recent = jax.tree.map(lambda w, past: jnp.concatenate([w[None], past]), now, state.past)
        start, unravel = ravel_pytree(now)

        def problem(flat):
            weights = unravel(flat)
            rate = rate_at(learning_rate, state.count)
            return objective(weights, gradients, **extra) + retention(weights, recent, rate)

        back = jnp.zeros_like(start)  # W_t - W+, summed by itself: beside weights, small steps would be rounded
        for _ in range(steps):
            curvature = lambda v, flat=start - back: jax.jvp(jax.grad(problem), (flat,), (v,))[1]
            back = back + jax.scipy.sparse.linalg.cg(curvature, jax.grad(problem)(start - back))[0]
        emitted = optax.tree.cast_like(unravel(back), updates)
        past = jax.tree.map(lambda w: w[:-1], recent)
        return emitted, GeneralizedGradientDescentState(optax.safe_increment(state.count), past)

    return optax.GradientTransformationExtraArgs(init, update)


def generalized_gradient_descent(
    learning_rate: optax.ScalarOrSchedule,
    objective: Callable[..., Array] = linearised,
    retention: Callable[[PyTree, PyTree, Array], Array] = proximal,
    *,
    window: int = 1,
    steps: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_generalized_gradient_descent`, whose solution becomes the weights.

    Args:
        learning_rate, objective, retention, window, steps: as of `scale_by_generalized_gradient_descent`.

    Raises:
        UserError: the learning rate is not finite and above 0, there is no window or step, or params are missing.

    With a retention that also pulls towards zero, gradient descent with weight decay, the decay taken implicitly:

    >>> def decaying(weights, recent, rate):
    ...     return proximal(weights, recent, rate) + optax.tree.norm(weights, squared=True) / 2
    >>> rule = generalized_gradient_descent(0.5, retention=decaying)
    >>> weights = jnp.array([3.0])
    >>> optax.apply_updates(weights, rule.update(jnp.zeros(1), rule.init(weights), weights)[0]).round(3).tolist()
    [2.0]

    References:
        NL, Eq. 31 and Definition 5.
    """
    rule = scale_by_generalized_gradient_descent(learning_rate, objective, retention, window=window, steps=steps)
    return optax.chain(rule, optax.scale(-1.0))
