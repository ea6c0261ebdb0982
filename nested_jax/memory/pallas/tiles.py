"""Arithmetic on tiles, matrices of two axes in a kernel's memory: what Mosaic lowers, with derivatives that it lowers too.

Columns (C, 1) and rows (1, C) hold a number a token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from nested_jax.typing import Array, Float

_EXACT = jax.lax.Precision.HIGHEST


def dot(a: Array, b: Array, along_a: int, along_b: int, fast: bool) -> Array:
    """The product of two tiles over one axis of each, summed in float32 (or float64); so are those of its derivatives.

    Args:
        fast: operands are rounded to bfloat16, else every product is of full float32.
    """
    return _dot(a, b, along_a, along_b, fast)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _dot(a, b, along_a, along_b, fast) -> Any:
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    if fast:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    axes, precision = (((along_a,), (along_b,)), ((), ())), None if fast else _EXACT
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=dtype)


def _dot_forward(a, b, along_a, along_b, fast):
    return _dot(a, b, along_a, along_b, fast), (a, b)


def _dot_backward(along_a, along_b, fast, operands, g):
    a, b = operands
    of_a = (g, b, 1, 1 - along_b) if along_a else (b, g, 1 - along_b, 1)
    of_b = (g, a, 0, 1 - along_a) if along_b else (a, g, 1 - along_a, 0)
    return dot(*of_a, fast), dot(*of_b, fast)


_dot.defvjp(_dot_forward, _dot_backward)


def shift(x: Float[Array, "C N"], by: int, fill: float) -> Float[Array, "C N"]:
    """Rows `by` later, `fill` before them."""
    return jnp.concatenate([jnp.full((by, x.shape[1]), fill, x.dtype), x[:-by]], axis=0)


def later(x: Float[Array, "C N"], fill: float) -> Float[Array, "C N"]:
    """One row later, `fill` in the first."""
    return _later(x, fill)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _later(x, fill) -> Any:
    return shift(x, 1, fill)


def _later_backward(fill, _, g):
    return (jnp.concatenate([g[1:], jnp.zeros_like(g[:1])], axis=0),)


_later.defvjp(lambda x, fill: (_later(x, fill), None), _later_backward)


def numbers(size: int) -> tuple[Array, Array]:
    """The row and the column of every element of a square tile."""
    return tuple(jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))  # pyright: ignore[reportReturnType]


def column(row: Float[Array, "1 C"]) -> Float[Array, "C 1"]:
    """A row as a column."""
    i, j = numbers(row.shape[1])
    return jnp.sum(jnp.where(i == j, row, 0.0), axis=1, keepdims=True)


def row_of(x: Float[Array, "C N"], at: int) -> Float[Array, "1 N"]:
    """One row, by a sum, whose derivative is a mask."""
    i = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.sum(jnp.where(i == at, x, 0.0), axis=0, keepdims=True)


def column_of(x: Float[Array, "C N"], at: int) -> Float[Array, "C 1"]:
    """One column, by a sum."""
    i = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.sum(jnp.where(i == at, x, 0.0), axis=1, keepdims=True)


def rounded(x: Float[Array, "C K"], fast: bool) -> Float[Array, "C K"]:
    """x as fast products see it; its derivative is not rounded."""
    return x + jax.lax.stop_gradient(x.astype(jnp.bfloat16).astype(x.dtype) - x) if fast else x


def row(column: Float[Array, "C 1"]) -> Float[Array, "1 C"]:
    """A column as a row."""
    i, j = numbers(column.shape[0])
    return jnp.sum(jnp.where(i == j, column, 0.0), axis=0, keepdims=True)


def square(x: Float[Array, "C K"]) -> Float[Array, "C 1"]:
    """|x|^2 of every row."""
    return jnp.sum(x * x, axis=1, keepdims=True)


def decay(gate: Float[Array, "C 1"]) -> Float[Array, "C C"]:
    """Lower triangle of products of gates: [t, s] = gate_{s+1} ... gate_t, 1 on the diagonal; exact at zero gates."""
    return _decay(gate)


@jax.custom_vjp
def _decay(gate) -> Any:
    i, j = numbers(gate.shape[0])
    products, by = jnp.where(i > j, gate, 1.0), 1
    while by < gate.shape[0]:
        products, by = products * shift(products, by, 1.0), 2 * by
    return jnp.where(i >= j, products, 0.0)


def _decay_forward(gate):
    products = _decay(gate)
    return products, products


def _decay_backward(products, g):
    """d[t, s] = sum_u [t, u] dgate_u [u - 1, s]."""
    return (jnp.sum(dot(products, g, 0, 0, False) * shift(products, 1, 0.0), axis=1, keepdims=True),)


_decay.defvjp(_decay_forward, _decay_backward)


def _three_passes(a: Array, b: Array, along_a: int = 1) -> Array:
    """A product of float32 by three of bfloat16: the last bits of both at once are left out."""
    high = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    a_high, b_high = high(a), high(b)
    product = partial(dot, along_a=along_a, along_b=0, fast=True)
    return product(a_high, b_high) + (product(a_high, b - b_high) + product(a - a_high, b_high))


def _careful(a: Array, b: Array, along_a: int, fast: bool) -> Array:
    """A product with the inverse, whose rows may cancel."""
    return _three_passes(a, b, along_a) if fast else dot(a, b, along_a, 0, fast)


def inverses(lowers: list[Float[Array, "C C"]], turning: list[bool], fast: bool) -> list[Float[Array, "C C"]]:
    """(I + L)^-1 of strictly lower triangular matrices, all in step, so that one's products hide the others' latency.

    Blocks of 1, 2, 4, ... rows are inverted: where those of the diagonal are, X, the block B below becomes -X B X. No power
    of L is made, whose rounding errors would be larger than the inverse. Fast ones are of one bfloat16 pass, refined twice
    by what they leave over, or of three passes.

    Args:
        turning: which have strengths beyond 1, that turn a sign; their sums cancel, and need the three passes.
    """
    size = lowers[0].shape[0]
    i, j = numbers(size)
    one = (i == j).astype(lowers[0].dtype)
    product = partial(dot, along_a=1, along_b=0, fast=fast)
    products = [_three_passes if fast and turns else product for turns in turning]
    every = lambda of, *lists: [of(*each) for each in zip(*lists, strict=True)]
    apart = i ^ j  # its highest bit tells the smallest block in which both are
    found = [one - jnp.where(apart == 1, lower, 0.0) for lower in lowers]
    for bits in range(1, (size - 1).bit_length()):  # of blocks of 2, 4, 8, ... rows
        below = (apart >> bits) == 1
        half = every(lambda by, x, lower, below=below: by(x, jnp.where(below, lower, 0.0)), products, found, lowers)
        found = every(lambda by, x, y: x - by(y, x), products, found, half)
    for _ in range(1 if fast else 0):
        left = every(lambda x, lower, turns: None if turns else one - x - _three_passes(lower, x), found, lowers, turning)
        found = every(lambda x, y: x if y is None else x + product(x, y), found, left)
    return found


def solve(
    lowers: list[Float[Array, "C C"]],
    rights: list[Float[Array, "C V"]],
    inverses: list[Float[Array, "C C"]],
    fast: bool,
) -> list[Float[Array, "C V"]]:
    """(I + L)^-1 R of each, by the inverses of I + L; the derivative is that by L and R."""
    return _solve(lowers, rights, inverses, fast)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _solve(lowers, rights, inverses, fast) -> Any:
    return [_careful(x, right, 1, fast) for x, right in zip(inverses, rights, strict=True)]


def _solve_forward(lowers, rights, inverses, fast) -> Any:
    solved = _solve(lowers, rights, inverses, fast)
    return solved, (inverses, solved)


def _solve_backward(fast, kept, gs):
    inverses, solved = kept
    rights = [_careful(x, g, 0, fast) for x, g in zip(inverses, gs, strict=True)]
    i, j = numbers(gs[0].shape[0])
    lowers = [-jnp.where(i > j, dot(r, x, 1, 1, fast), 0.0) for r, x in zip(rights, solved, strict=True)]
    return lowers, rights, None


_solve.defvjp(_solve_forward, _solve_backward)
