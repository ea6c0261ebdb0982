"""Momentum: a linear memory of gradients; with preconditioned values, and with features as keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from nested_jax.errors import UserError
from nested_jax.numerics import bounded, zeros
from nested_jax.optim._hyperparameters import UP_TO_ONE, check, check_functions
from nested_jax.optim._precision import at_rate, in_float32
from nested_jax.paths import path_name
from nested_jax.typing import Array, PyTree


class MomentumState(NamedTuple):
    """The memory m: a tree of the parameters' shapes, float32 or finer."""

    momentum: PyTree


def scale_by_momentum(decay: ArrayLike = 0.9, *, nesterov: bool = False) -> optax.GradientTransformation:
    """A linear memory of gradients, trained by gradient descent with decay on its dot product with each gradient.

        m <- decay m + g        a step of rate 1 on -<m, g>
        emits m, or g + decay m with nesterov

    The gradients are summed unscaled and the learning rate comes last, so it equals `optax.trace` under any schedule.

    Args:
        decay: share of the memory kept each step, in [0, 1]. With 0.9 the last 7 gradients have half of the weight.
        nesterov: emit the memory after one more step with the same gradient.

    Returns:
        A transformation of gradients of any shapes, with state `MomentumState`.

    Raises:
        UserError: the decay is out of range.

    Source: NL Eq. 33-34.

    >>> rule = scale_by_momentum(decay=0.5)
    >>> _, state = rule.update(jnp.array([4.0]), rule.init(jnp.zeros(1)))
    >>> print(rule.update(jnp.array([1.0]), state)[0])  # 0.5 * 4 + 1
    [3.]
    """
    check("momentum", UP_TO_ONE, decay=decay)

    def init(params):
        return MomentumState(zeros(params))

    def update(updates, state, params=None):
        del params
        add = lambda m, g: bounded(decay * m + g, m, g)
        momentum = jax.tree.map(add, state.momentum, updates)
        emitted = jax.tree.map(add, momentum, updates) if nesterov else momentum
        return emitted, MomentumState(optax.tree.cast_like(momentum, state.momentum))

    return in_float32(optax.GradientTransformation(init, update))


def momentum(
    learning_rate: optax.ScalarOrSchedule, decay: ArrayLike = 0.9, *, nesterov: bool = False
) -> optax.GradientTransformation:
    """Gradient descent with momentum: `scale_by_momentum`, then the learning rate. Equals `optax.sgd(..., momentum=)`.

        m <- decay m + g        w <- w - learning_rate m

    Args:
        learning_rate: a number or a schedule.
        decay, nesterov: as of `scale_by_momentum`.

    Returns:
        An optimizer of parameters of any shapes.

    Raises:
        UserError: a hyperparameter is not finite or out of range.

    Source: NL Eq. 33-34.

    >>> params = jnp.array([2.0])
    >>> rule = momentum(0.5)
    >>> state = rule.init(params)
    >>> for _ in range(2):
    ...     updates, state = rule.update(params, state)  # the gradient of params^2 / 2
    ...     params = optax.apply_updates(params, updates)
    >>> print(params.round(3))
    [-0.4]
    """
    check("momentum", learning_rate=learning_rate)
    return at_rate(scale_by_momentum(decay, nesterov=nesterov), learning_rate)


def scale_by_preconditioned_momentum(
    preconditioner: optax.GradientTransformation | None = None, decay: ArrayLike = 0.9, *, nesterov: bool = False
) -> optax.GradientTransformation:
    """A linear memory whose keys are gradients and whose values are preconditioned gradients.

        m <- decay m + P(g)
        emits m, or P(g) + decay m with nesterov

    Args:
        preconditioner: P, an optax transformation. None: `optax.scale_by_rms`, which divides by the root of an average of
            squares. `optax.identity()` makes it `scale_by_momentum`.
        decay, nesterov: as of `scale_by_momentum`.

    Returns:
        A transformation of gradients of any shapes; its state is the preconditioner's and `MomentumState`.

    Raises:
        UserError: the decay is out of range.

    Source: NL Eq. 46-47.

    >>> rule = scale_by_preconditioned_momentum(optax.scale_by_sign(), decay=0.5)
    >>> _, state = rule.update(jnp.array([4.0]), rule.init(jnp.zeros(1)))
    >>> print(rule.update(jnp.array([-3.0]), state)[0])  # 0.5 * 1 - 1
    [-0.5]
    """
    check("preconditioned_momentum", UP_TO_ONE, decay=decay)
    preconditioner = optax.scale_by_rms() if preconditioner is None else preconditioner
    return in_float32(optax.chain(preconditioner, scale_by_momentum(decay, nesterov=nesterov)))


def preconditioned_momentum(
    learning_rate: optax.ScalarOrSchedule,
    preconditioner: optax.GradientTransformation | None = None,
    decay: ArrayLike = 0.9,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Momentum of preconditioned gradients: `scale_by_preconditioned_momentum`, then the learning rate.

        m <- decay m + P(g)        w <- w - learning_rate m

    Args:
        learning_rate: a number or a schedule.
        preconditioner, decay, nesterov: as of `scale_by_preconditioned_momentum`.

    Returns:
        An optimizer of parameters of any shapes.

    Raises:
        UserError: a hyperparameter is not finite or out of range.

    Source: NL Eq. 46-47.

    >>> rule = preconditioned_momentum(0.1, optax.identity())
    >>> print(rule.update(jnp.ones(2), rule.init(jnp.ones(2)))[0] / 0.1)
    [-1. -1.]
    """
    check("preconditioned_momentum", learning_rate=learning_rate)
    return at_rate(scale_by_preconditioned_momentum(preconditioner, decay, nesterov=nesterov), learning_rate)


def scale_by_feature_momentum(
    feature_map: Callable[[Array], Array] | None = None,
    decay: ArrayLike = 0.9,
    *,
    preconditioner: Callable[[Array], Array] | None = None,
) -> optax.GradientTransformation:
    """A linear memory whose keys are features of gradients.

        m <- decay m + P(g) phi(g)        element-wise
        emits m

    Args:
        feature_map: phi, from one parameter's gradient to an array of its shape. Odd functions descend. None: `jnp.arcsinh`,
            which grows with the logarithm of large entries, so a few outliers do not dominate the memory.
        decay: share of the memory kept each step, in [0, 1].
        preconditioner: P, the values of the keys, from one parameter's gradient to an array of its shape. None: P = 1.

    Returns:
        A transformation of gradients of any shapes, with state `MomentumState`.

    Raises:
        UserError: the decay is out of range, or the features or values of a parameter have another shape.

    Source: NL Eq. 51.

    >>> rule = scale_by_feature_momentum(jnp.sign, decay=0.5)
    >>> _, state = rule.update(jnp.array([4.0]), rule.init(jnp.zeros(1)))
    >>> print(rule.update(jnp.array([-3.0]), state)[0])  # 0.5 * 1 - 1
    [-0.5]
    """
    check("feature_momentum", UP_TO_ONE, decay=decay)
    check_functions("feature_momentum", feature_map=feature_map, preconditioner=preconditioner)
    memory = scale_by_momentum(decay)
    phi = jnp.arcsinh if feature_map is None else feature_map

    def features(path, g):
        factors = {"feature_map": phi(g)} | ({} if preconditioner is None else {"preconditioner": preconditioner(g)})
        for name, x in factors.items():
            if jnp.shape(x) != g.shape:
                raise UserError(
                    f"feature_momentum: {name} makes {list(jnp.shape(x))} of parameter {path_name(path)}'s gradient, whose "
                    f"shape is {list(g.shape)}: give a map that keeps it"
                )
        return math.prod(factors.values())

    def update(updates, state, params=None):
        return memory.update(jax.tree_util.tree_map_with_path(features, updates), state, params)

    return in_float32(optax.GradientTransformation(memory.init, update))


def feature_momentum(
    learning_rate: optax.ScalarOrSchedule,
    feature_map: Callable[[Array], Array] | None = None,
    decay: ArrayLike = 0.9,
    *,
    preconditioner: Callable[[Array], Array] | None = None,
) -> optax.GradientTransformation:
    """Momentum of features of gradients: `scale_by_feature_momentum`, then the learning rate.

        m <- decay m + P(g) phi(g)        w <- w - learning_rate m

    Args:
        learning_rate: a number or a schedule.
        feature_map, decay, preconditioner: as of `scale_by_feature_momentum`.

    Returns:
        An optimizer of parameters of any shapes.

    Raises:
        UserError: a hyperparameter is not finite or out of range, or the features or values of a parameter have another
            shape.

    Source: NL Eq. 51.

    >>> rule = feature_momentum(0.1, jnp.sign, decay=0.5)
    >>> state = rule.init(jnp.ones(2))
    >>> for gradient in ([1.0, -9.0], [2.0, 5.0]):
    ...     updates, state = rule.update(jnp.array(gradient), state)
    >>> print(updates)
    [-0.15 -0.05]
    """
    check("feature_momentum", learning_rate=learning_rate)
    return at_rate(scale_by_feature_momentum(feature_map, decay, preconditioner=preconditioner), learning_rate)
