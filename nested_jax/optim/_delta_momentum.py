"""Delta momentum: a memory of gradients that makes room before it writes."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import optax

from nested_jax.description import Description
from nested_jax.numerics import unit_norm, upcast, zeros
from nested_jax.optim._hyperparameters import check
from nested_jax.paths import DimensionNumbers, map_matrices
from nested_jax.typing import PyTree


class DeltaMomentumState(NamedTuple):
    """The memory, one value for every parameter, of its shape, in float32 or finer; and the preconditioner's state."""

    momentum: PyTree
    preconditioner: PyTree
    description = Description("1/2 |u^T m - P|^2, u = g / |g|", "m <- decay m - erase u (u^T m) + P(g)")


def scale_by_delta_momentum(
    decay: float = 0.9,
    erase: float = 0.1,
    *,
    normalize: bool = True,
    preconditioner: optax.GradientTransformation | None = None,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """A linear memory of gradients trained on its squared error: what it holds along a new gradient is erased first.

        m <- decay m - erase u (u^T m) + P(g)      u = g / |g|_F, matrices (in, out) as in Flax kernels
        m <- (decay - erase u^2) m + P(g)          element-wise for vectors, |g| taken along the last axis
        emits m

    In the paper's orientation (out, in) it is m (decay I - erase u^T u) + P(g) (NL Eq. 48-49).

    Args:
        decay: what is kept of the memory each step, from 0 to 1.
        erase: strength of the erasure, from 0 (which leaves momentum) to 1.
        normalize: False takes the paper's u = g. Its erasure depends on the scale of the loss, and diverges where
            erase |g|^2 exceeds 1 + decay.
        preconditioner: P, any optax transformation; None for P(g) = g.
        dimension_numbers: which leaves are matrices, and along which axes; as optax's Muon takes them (see `matrices`).
            None: leaves of two axes.

    Raises:
        UserError: a hyperparameter is out of range, or dimension numbers do not fit a parameter.
    """
    check("delta_momentum", low=0.0, high=1.0, decay=decay, erase=erase)
    values = optax.with_extra_args_support(preconditioner or optax.identity())

    def init(params):
        return DeltaMomentumState(zeros(params), values.init(params))

    def matrix(m, g, value):
        u = unit_norm(g, (-2, -1)) if normalize else g
        return decay * m - erase * (u @ (jnp.swapaxes(u, -2, -1) @ m)) + value

    def vector(m, g, value):
        u = unit_norm(g, -1 if g.ndim else None) if normalize else g
        return (decay - erase * jnp.square(u)) * m + value

    def update(updates, state, params=None, **extra):
        written, inner = values.update(updates, state.preconditioner, params, **extra)
        trees = state.momentum, upcast(updates), upcast(written)
        momentum = map_matrices(matrix, dimension_numbers, *trees, vectors=vector)
        momentum = optax.tree.cast_like(momentum, state.momentum)
        return optax.tree.cast_like(momentum, updates), DeltaMomentumState(momentum, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def delta_momentum(
    learning_rate: optax.ScalarOrSchedule,
    decay: float = 0.9,
    erase: float = 0.1,
    *,
    normalize: bool = True,
    preconditioner: optax.GradientTransformation | None = None,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_delta_momentum`, then the learning rate. Without erasure it is `momentum`.

    Args:
        learning_rate: a number or a schedule.
        decay, erase, normalize, preconditioner, dimension_numbers: as of `scale_by_delta_momentum`.

    Raises:
        UserError: a hyperparameter is not finite or out of range, or dimension numbers do not fit a parameter.

    A gradient replaces what the memory holds along it, and leaves the rest:

    >>> rule = delta_momentum(1.0, decay=1.0, erase=1.0)
    >>> state = rule.init(jnp.zeros((2, 2)))
    >>> for gradient in ([[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 3.0]]):
    ...     updates, state = rule.update(jnp.array(gradient), state)
    >>> print(-updates)
    [[1. 0.]
     [0. 3.]]

    References:
        NL, Eq. 48-49.
    """
    check("delta_momentum", learning_rate=learning_rate)
    rule = scale_by_delta_momentum(
        decay, erase, normalize=normalize, preconditioner=preconditioner, dimension_numbers=dimension_numbers
    )
    return optax.chain(rule, optax.scale_by_learning_rate(learning_rate))
