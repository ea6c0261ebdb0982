"""Memories of zeros in float32 or finer; norms, roots and quotients with derivatives that are finite at zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nested_jax.memory.recurrence import upcast
from nested_jax.typing import Array, PyTree


def zeros(params: PyTree) -> PyTree:
    """An empty memory of every parameter, each call's its own: a state is donated, and no buffer can be twice."""
    return jax.tree.map(jnp.zeros_like, upcast(params))


def safe_root(x: Array) -> Array:
    """Square root, its derivative zero at zero."""
    some = x > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, x, 1)), 0)


@jax.custom_jvp
def safe_divide(x: Array, by: Array) -> Array:
    """x / by, and zero with derivatives of zero where `by` is zero."""
    some = by != 0
    return jnp.where(some, x / jnp.where(some, by, 1), 0)


@safe_divide.defjvp
def _safe_divide_jvp(primals, tangents):
    """Without by^-2, which overflows in float32 where |by| < 1e-19."""
    (x, by), (dx, dby) = primals, tangents
    ratio = safe_divide(x, by)
    return ratio, safe_divide(dx - ratio * dby, by)


def norm(x: Array, axis: int | tuple[int, ...] | None) -> Array:
    """Euclidean norm over some axes, which are kept."""
    return safe_root(jnp.sum(jnp.square(x), axis, keepdims=True))


def unit(x: Array, axis: int | tuple[int, ...] | None) -> Array:
    """x over its norm; zeros stay zeros."""
    return safe_divide(x, norm(x, axis))
