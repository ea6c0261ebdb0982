"""Delta momentum: a memory of gradients trained by the delta rule."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from nested_jax.description import Description
from nested_jax.numerics import bounded, split_scale, unit_norm, zeros
from nested_jax.optim._hyperparameters import UP_TO_ONE, check
from nested_jax.optim._precision import at_rate, in_float32
from nested_jax.paths import DimensionNumbers, map_matrices
from nested_jax.typing import PyTree


class DeltaMomentumState(NamedTuple):
    """The memory m: a tree of the parameters' shapes, float32 or finer; and the preconditioner's state."""

    momentum: PyTree
    preconditioner: PyTree
    description = Description("1/2 |u^T m - P|^2, u = g / |g|", "m <- decay m - erase u (u^T m) + P(g)")


def scale_by_delta_momentum(
    decay: ArrayLike = 0.9,
    erase: ArrayLike = 0.1,
    *,
    normalize: bool = True,
    preconditioner: optax.GradientTransformation | None = None,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """A linear memory of gradients trained on its squared error: its part along a new gradient is erased before the write.

        m <- decay m - erase u (u^T m) + P(g)      u = g / |g|_F, matrices (in, out) as in Flax kernels
        m <- (decay - erase u^2) m + P(g)          element-wise for vectors, |g| taken along the last axis
        emits m

    In the paper's orientation (out, in) it is m (decay I - erase u^T u) + P(g).

    Args:
        decay: share of the memory kept each step, in [0, 1].
        erase: strength of the erasure, in [0, 1]; 0 is momentum.
        normalize: False takes the paper's u = g. Its erasure depends on the scale of the loss, and diverges where
            erase |g|^2 exceeds 1 + decay.
        preconditioner: P, any optax transformation. None: P(g) = g.
        dimension_numbers: which leaves are matrices, and their (in, out) axes, as in `optax.contrib.muon`; see `matrices`.
            None: leaves of two axes, (in, out).

    Returns:
        A transformation of gradients of any shapes, with state `DeltaMomentumState`.

    Raises:
        UserError: a hyperparameter is out of range, or dimension numbers do not fit a parameter.

    Source: NL Eq. 48-49.

    >>> rule = scale_by_delta_momentum(decay=1.0, erase=1.0)
    >>> _, state = rule.update(jnp.array([[3.0, 4.0]]), rule.init(jnp.zeros((1, 2))))
    >>> print(rule.update(jnp.array([[0.0, 2.0]]), state)[0])  # one input: all columns are erased
    [[0. 2.]]
    """
    check("delta_momentum", UP_TO_ONE, decay=decay, erase=erase)
    values = optax.with_extra_args_support(preconditioner or optax.identity())

    def init(params):
        return DeltaMomentumState(zeros(params), values.init(params))

    def step(m, g, value, axis, project):
        u, size = (unit_norm(g, axis), 1) if normalize else split_scale(g, axis)
        part, scale = split_scale(m, axis)  # sums of products overflow only as they are scaled back, last
        erased = erase * project(u, part) * scale * size * size
        return bounded(decay * m - erased + value, m, value)

    def matrix(m, g, value):
        return step(m, g, value, (-2, -1), lambda u, m: u @ (jnp.swapaxes(u, -2, -1) @ m))

    def vector(m, g, value):
        return step(m, g, value, -1 if g.ndim else None, lambda u, m: jnp.square(u) * m)

    def update(updates, state, params=None, **extra):
        written, inner = values.update(updates, state.preconditioner, params, **extra)
        momentum = map_matrices(matrix, dimension_numbers, state.momentum, updates, written, vectors=vector)
        momentum = optax.tree.cast_like(momentum, state.momentum)
        return momentum, DeltaMomentumState(momentum, inner)

    return in_float32(optax.GradientTransformationExtraArgs(init, update))


def delta_momentum(
    learning_rate: optax.ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    erase: ArrayLike = 0.1,
    *,
    normalize: bool = True,
    preconditioner: optax.GradientTransformation | None = None,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """Delta momentum: `scale_by_delta_momentum`, then the learning rate. Without erasure it is `momentum`.

        m <- decay m - erase u (u^T m) + P(g)        w <- w - learning_rate m

    Args:
        learning_rate: a number or a schedule.
        decay, erase, normalize, preconditioner, dimension_numbers: as of `scale_by_delta_momentum`.

    Returns:
        An optimizer of parameters of any shapes; kernels are (in, out).

    Raises:
        UserError: a hyperparameter is not finite or out of range, or dimension numbers do not fit a parameter.

    Source: NL Eq. 48-49.

    A gradient replaces the part of the memory along it and leaves the rest:

    >>> rule = delta_momentum(1.0, decay=1.0, erase=1.0)
    >>> state = rule.init(jnp.zeros((2, 2)))
    >>> for gradient in ([[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 3.0]]):
    ...     updates, state = rule.update(jnp.array(gradient), state)
    >>> print(-updates)
    [[1. 0.]
     [0. 3.]]
    """
    check("delta_momentum", learning_rate=learning_rate)
    rule = scale_by_delta_momentum(
        decay, erase, normalize=normalize, preconditioner=preconditioner, dimension_numbers=dimension_numbers
    )
    return at_rate(rule, learning_rate)
