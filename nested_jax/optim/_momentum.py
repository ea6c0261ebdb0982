"""Momentum: a memory of gradients; with preconditioned values, and with features as keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.errors import UserError
from nested_jax.numerics import upcast, zeros
from nested_jax.optim._hyperparameters import check
from nested_jax.paths import path_name
from nested_jax.typing import Array, PyTree


class MomentumState(NamedTuple):
    """The memory: one value for every parameter, of its shape, in float32 or finer."""

    momentum: PyTree


def scale_by_momentum(decay: float = 0.9, *, nesterov: bool = False) -> optax.GradientTransformation:
    """A linear memory of gradients, trained by gradient descent on its dot product with each, with decay.

        m <- decay m + g        the step on -<m, g> of rate 1 (NL Eq. 33-34)
        emits m, or g + decay m with nesterov

    Gradients are summed as they are and the learning rate comes last, so that it is `optax.trace` under any schedule.

    Args:
        decay: what is kept of the memory each step, from 0 to 1. With 0.9 the last 7 gradients hold half of its weight.
        nesterov: look one step ahead.

    Raises:
        UserError: the decay is out of range.
    """
    check("momentum", low=0.0, high=1.0, decay=decay)

    def init(params):
        return MomentumState(zeros(params))

    def update(updates, state, params=None):
        del params
        gradients = upcast(updates)
        add = lambda m, g: decay * m + g
        momentum = jax.tree.map(add, state.momentum, gradients)
        emitted = jax.tree.map(add, momentum, gradients) if nesterov else momentum
        return optax.tree.cast_like(emitted, updates), MomentumState(optax.tree.cast_like(momentum, state.momentum))

    return optax.GradientTransformation(init, update)


def momentum(
    learning_rate: optax.ScalarOrSchedule, decay: float = 0.9, *, nesterov: bool = False
) -> optax.GradientTransformation:
    """Gradient descent with momentum: `scale_by_momentum`, then the learning rate. Equals `optax.sgd(..., momentum=)`.

    Args:
        learning_rate: a number or a schedule.
        decay, nesterov: as of `scale_by_momentum`.

    Raises:
        UserError: a hyperparameter is not finite or out of range.

    >>> params = jnp.array([2.0])
    >>> rule = momentum(0.5)
    >>> state = rule.init(params)
    >>> for _ in range(2):
    ...     updates, state = rule.update(params, state)  # the gradient of params^2 / 2
    ...     params = optax.apply_updates(params, updates)
    >>> print(params.round(3))
    [-0.4]

    References:
        NL, Eq. 33-34.
    """
    check("momentum", learning_rate=learning_rate)
    return optax.chain(scale_by_momentum(decay, nesterov=nesterov), optax.scale_by_learning_rate(learning_rate))


def scale_by_preconditioned_momentum(
    preconditioner: optax.GradientTransformation | None = None, decay: float = 0.9, *, nesterov: bool = False
) -> optax.GradientTransformation:
    """A linear memory whose keys are gradients and whose values are what a preconditioner makes of them.

        m <- decay m + P(g)        (NL Eq. 46-47)
        emits m, or P(g) + decay m with nesterov

    Args:
        preconditioner: P, any optax transformation; the default divides by the root of an average of squares
            (`optax.scale_by_rms`). `optax.identity()` makes it `scale_by_momentum`.
        decay, nesterov: as of `scale_by_momentum`.

    Raises:
        UserError: the decay is out of range.
    """
    check("preconditioned_momentum", low=0.0, high=1.0, decay=decay)
    preconditioner = optax.scale_by_rms() if preconditioner is None else preconditioner
    return optax.chain(preconditioner, scale_by_momentum(decay, nesterov=nesterov))


def preconditioned_momentum(
    learning_rate: optax.ScalarOrSchedule,
    preconditioner: optax.GradientTransformation | None = None,
    decay: float = 0.9,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """`scale_by_preconditioned_momentum`, then the learning rate.

    Args:
        learning_rate: a number or a schedule.
        preconditioner, decay, nesterov: as of `scale_by_preconditioned_momentum`.

    Raises:
        UserError: a hyperparameter is not finite or out of range.

    >>> rule = preconditioned_momentum(0.1, optax.identity())
    >>> rule.update(jnp.ones(2), rule.init(jnp.ones(2)))[0] / 0.1
    Array([-1., -1.], dtype=float32)

    References:
        NL, Eq. 46-47.
    """
    check("preconditioned_momentum", learning_rate=learning_rate)
    rule = scale_by_preconditioned_momentum(preconditioner, decay, nesterov=nesterov)
    return optax.chain(rule, optax.scale_by_learning_rate(learning_rate))


def scale_by_feature_momentum(
    feature_map: Callable[[Array], Array] = jnp.arcsinh,
    decay: float = 0.9,
    *,
    preconditioner: Callable[[Array], Array] | None = None,
) -> optax.GradientTransformation:
    """A linear memory whose keys are features of gradients.

        m <- decay m + P(g) phi(g)        element-wise, P(g) = 1 unless it is given (NL Eq. 51)
        emits m

    Args:
        feature_map: phi, of one parameter's gradient to an array of its shape; odd functions descend. The default grows
            with the logarithm of large entries, so that a few outliers do not fill the memory.
        decay: what is kept of the memory each step, from 0 to 1.
        preconditioner: P, the values that belong to the keys, of one parameter's gradient to an array of its shape.

    Raises:
        UserError: the decay is out of range, or the features or values of a parameter are of another shape.
    """
    check("feature_momentum", low=0.0, high=1.0, decay=decay)
    memory = scale_by_momentum(decay)

    def features(path, g):
        made = {"feature_map": feature_map(g)} | ({} if preconditioner is None else {"preconditioner": preconditioner(g)})
        for what, x in made.items():
            if jnp.shape(x) != g.shape:
                raise UserError(
                    f"feature_momentum: {what} makes {list(jnp.shape(x))} of the gradient of parameter {path_name(path)}, "
                    f"whose shape is {list(g.shape)}: give a map that keeps it"
                )
        return math.prod(made.values())

    def update(updates, state, params=None):
        keys = jax.tree_util.tree_map_with_path(features, upcast(updates))
        emitted, state = memory.update(keys, state, params)
        return optax.tree.cast_like(emitted, updates), state

    return optax.GradientTransformation(memory.init, update)


def feature_momentum(
    learning_rate: optax.ScalarOrSchedule,
    feature_map: Callable[[Array], Array] = jnp.arcsinh,
    decay: float = 0.9,
    *,
    preconditioner: Callable[[Array], Array] | None = None,
) -> optax.GradientTransformation:
    """`scale_by_feature_momentum`, then the learning rate.

    Args:
        learning_rate: a number or a schedule.
        feature_map, decay, preconditioner: as of `scale_by_feature_momentum`.

    Raises:
        UserError: a hyperparameter is not finite or out of range, or the features or values of a parameter are of another
            shape.

    >>> rule = feature_momentum(0.1, jnp.sign, decay=0.5)
    >>> state = rule.init(jnp.ones(2))
    >>> for gradient in ([1.0, -9.0], [2.0, 5.0]):
    ...     updates, state = rule.update(jnp.array(gradient), state)
    >>> print(updates)
    [-0.15 -0.05]

    References:
        NL, Eq. 51.
    """
    check("feature_momentum", learning_rate=learning_rate)
    return optax.chain(
        scale_by_feature_momentum(feature_map, decay, preconditioner=preconditioner),
        optax.scale_by_learning_rate(learning_rate),
    )
