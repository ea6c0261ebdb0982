"""Attentional biases: what a memory's output y at a key should be like, given the value v (MIRAS).

An `Objective` gives the loss of one token and its error, the derivative with respect to y, by which the memory learns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from nested_jax.errors import UserError
from nested_jax.typing import Array, Float

_SMOOTH = 1e-6  # below its root, l_p is quadratic: derivatives of every order are finite at zero


class Objective(NamedTuple):
    """A loss of outputs and values and its derivative with respect to the outputs.

    loss: (y (..., V), v (..., V)) -> (...); error: the same -> (..., V); name: the loss in symbols, y = M k.
    """

    loss: Callable[[Array, Array], Array]
    error: Callable[[Array, Array], Array]
    name: str


def dot_product() -> Objective:
    """-<y, v>: Hebbian (NL Eq. 64).

    >>> dot_product().error(jnp.ones(2), jnp.array([1.0, 2.0])).tolist()
    [-1.0, -2.0]
    """
    error = lambda y, v: jnp.broadcast_to(-v, jnp.broadcast_shapes(y.shape, v.shape))
    return Objective(lambda y, v: -jnp.sum(y * v, -1), error, "-<M k, v>")


def l2() -> Objective:
    """|y - v|^2 / 2: the delta rule (NL Eq. 65).

    >>> l2().error(jnp.array([3.0, 4.0]), jnp.zeros(2)).tolist()
    [3.0, 4.0]
    """
    return Objective(lambda y, v: jnp.sum((y - v) ** 2, -1) / 2, lambda y, v: y - v, "1/2 |M k - v|^2")


def lp(power: float = 3.0) -> Objective:
    """sum_i |y_i - v_i|^p / p, each |e| as sqrt(e^2 + 1e-6) (MIRAS section 5.1).

    Raises UserError for a power below 1.

    >>> lp(3.0).error(jnp.array([2.0, -1.0]), jnp.zeros(2)).round(3).tolist()
    [4.0, -1.0]
    """
    if not power >= 1:
        raise UserError(f"objective lp: power {power} must be at least 1")

    def error(y, v):
        e = y - v
        return e * (e**2 + _SMOOTH) ** (power / 2 - 1)

    loss = lambda y, v: jnp.sum(((y - v) ** 2 + _SMOOTH) ** (power / 2), -1) / power
    return Objective(loss, error, f"sum |M k - v|^{power:g} / {power:g}")


def huber(threshold: float = 1.0) -> Objective:
    """|e|^2 / 2 of an error e = y - v of a norm up to the threshold, threshold |e| - threshold^2 / 2 of a larger one.

    By the norm of the token's whole error, so that an outlier keeps its direction (MIRAS section 5.1; there by entries too).

    Raises UserError for a threshold that is not positive.

    >>> print(huber(1.0).error(jnp.array([[3.0, 4.0], [0.3, 0.4]]), jnp.zeros((2, 2))))
    [[0.6 0.8]
     [0.3 0.4]]
    """
    if not threshold > 0:
        raise UserError(f"objective huber: threshold {threshold} must be positive")

    def loss(y, v):
        square = jnp.sum((y - v) ** 2, -1)
        far = square > threshold**2
        return jnp.where(far, threshold * jnp.sqrt(jnp.where(far, square, 1.0)) - threshold**2 / 2, square / 2)

    def error(y, v):
        e = y - v
        square = jnp.sum(e**2, -1, keepdims=True)
        return e * threshold / jnp.sqrt(jnp.maximum(square, threshold**2))

    return Objective(loss, error, f"Huber of |M k - v|, linear from {threshold:g} on")


def oja(memory: Float[Array, "V K"], key: Float[Array, " K"], value: Float[Array, " V"]) -> Float[Array, ""]:
    """-<M k, v> + |M^T v|^2 / 2, half of NL Eq. 66, no function of the output alone: `LinearMemory` "oja" descends on it.

    >>> float(oja(jnp.eye(2), jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0])))
    -0.5
    """
    return -jnp.dot(memory @ key, value) + jnp.sum((memory.T @ value) ** 2) / 2
