"""AdaGrad as a memory of gradients without decay: element by element, or with whole outer products."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from nested_jax.description import Description
from nested_jax.errors import assert_choice
from nested_jax.numerics import safe_divide, safe_sqrt, upcast, zeros
from nested_jax.optim._hyperparameters import NON_NEGATIVE, check
from nested_jax.paths import DimensionNumbers, as_matrices, resolve_dimension_numbers
from nested_jax.typing import Array, Float, PyTree


class AdagradMemoryState(NamedTuple):
    """Sums of squares, of the parameters' shapes, or of outer products (..., in, in); float32 or finer."""

    squares: PyTree
    description = Description("sum |M g - P|^2 + penalty |M|^2, P the root sum of squares", "h <- h + g^2, or g g^T")


def scale_by_adagrad_memory(
    form: Literal["diagonal", "full"] = "diagonal",
    *,
    penalty: ArrayLike = 0.0,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformation:
    """The linear memory that maps all gradients so far to their root sum of squares, evaluated at the last gradient.

        diagonal:  h <- h + g^2         emits  sqrt(h) / (h + penalty) g
        full:      H <- H + g g^T       emits  H^{1/2} (H + penalty I)^{-1} g

    In the full form g is a vector, the last axis of a leaf, or a matrix (in, out); then H is (in, in), one for all columns.
    Its eigendecomposition costs in^3 operations a step. Directions in which all gradients were zero, up to rounding, stay
    zero.

    Args:
        form: squares element by element, or outer products.
        penalty: lambda, at least 0.
        dimension_numbers: which leaves are matrices, and their (in, out) axes, as in `optax.contrib.muon`; see `matrices`.
            None: leaves of two axes, (in, out).

    Returns:
        A transformation of gradients of any shapes, with state `AdagradMemoryState`.

    Raises:
        UserError: a hyperparameter is out of range, or dimension numbers do not fit a parameter.

    Source: NL Eq. 101-105 (diagonal), 106-111 (full); Duchi et al., JMLR 2011.

    >>> rule = scale_by_adagrad_memory()
    >>> _, state = rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))
    >>> print(rule.update(jnp.array([4.0]), state)[0])  # 4 / sqrt(9 + 16)
    [0.8]
    """
    check("adagrad_memory", NON_NEGATIVE, penalty=penalty)
    assert_choice("adagrad_memory: form", form, ("diagonal", "full"))

    columns = lambda tree: _columns(dimension_numbers, tree)

    def init(params):
        memory = zeros(params)
        return AdagradMemoryState(memory if form == "diagonal" else jax.tree.map(_outer, columns(memory)))

    def update(updates, state, params=None):
        del params
        gradients = upcast(updates)
        if form == "diagonal":
            squares = jax.tree.map(lambda h, g: h + jnp.square(g), state.squares, gradients)
            emitted = jax.tree.map(lambda h, g: safe_divide(safe_sqrt(h) * g, h + penalty), squares, gradients)
        else:
            matrices, transpose = jax.vjp(columns, gradients)  # a permutation of entries: its transpose is its inverse
            squares = jax.tree.map(lambda h, g: h + _outer(g), state.squares, matrices)
            (emitted,) = transpose(jax.tree.map(lambda h, g: _root_over(h, penalty) @ g, squares, matrices))
        squares = optax.tree.cast_like(squares, state.squares)
        return optax.tree.cast_like(emitted, updates), AdagradMemoryState(squares)

    return optax.GradientTransformation(init, update)


def _outer(g: Float[Array, "*batch N M"]) -> Float[Array, "*batch N N"]:
    return g @ jnp.swapaxes(g, -2, -1)


def _columns(dimension_numbers: DimensionNumbers, tree: PyTree) -> PyTree:
    """Every leaf as (..., in, out); a vector (..., in) becomes (..., in, 1)."""
    leaves, structure = jax.tree.flatten(tree)
    column = lambda leaf, numbers: as_matrices(leaf, numbers) if numbers else jnp.atleast_1d(leaf)[..., None]
    return structure.unflatten(map(column, leaves, resolve_dimension_numbers(dimension_numbers, tree)))


@jax.custom_jvp
def _root_over(H: Float[Array, "*batch N N"], penalty: ArrayLike) -> Float[Array, "*batch N N"]:
    """H^{1/2} (H + penalty I)^{-1} of a positive semi-definite H, zero on its null space."""
    values, vectors = _eigen(H)
    return _reconstruct(vectors, safe_divide(jnp.sqrt(values), values + penalty)[..., None, :])


@_root_over.defjvp
def _root_over_jvp(primals, tangents):
    """By divided differences of f(x) = sqrt(x) / (x + penalty), which need no gap between eigenvalues."""
    (H, penalty), (dH, dpenalty) = primals, tangents
    values, vectors = _eigen(H)
    roots, f = jnp.sqrt(values), safe_divide(jnp.sqrt(values), values + penalty)
    a, b, x, y = roots[..., :, None], roots[..., None, :], values[..., :, None], values[..., None, :]
    rotated = jnp.swapaxes(vectors, -2, -1) @ dH @ vectors
    # one quotient after the other: in float32 the product of the denominators underflows
    both = safe_divide(safe_divide(rotated, x + penalty) * safe_divide(penalty - a * b, a + b), y + penalty)
    one = safe_divide(rotated, jnp.maximum(x, y)) * (f[..., :, None] + f[..., None, :])
    rotated = jnp.where((x > 0) & (y > 0), both, one)
    by_penalty = -safe_divide(roots, jnp.square(values + penalty)) * dpenalty
    value = _reconstruct(vectors, f[..., None, :])
    return value, vectors @ rotated @ jnp.swapaxes(vectors, -2, -1) + _reconstruct(vectors, by_penalty[..., None, :])


def _eigen(H):
    values, vectors = jnp.linalg.eigh(H)
    floor = H.shape[-1] * jnp.finfo(H.dtype).eps * jnp.max(values, axis=-1, keepdims=True)
    return jnp.where(values > floor, values, 0), vectors


def _reconstruct(vectors, middle):
    return (vectors * middle) @ jnp.swapaxes(vectors, -2, -1)


def adagrad_memory(
    learning_rate: optax.ScalarOrSchedule,
    form: Literal["diagonal", "full"] = "diagonal",
    *,
    penalty: ArrayLike = 0.0,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformation:
    """AdaGrad as a memory: `scale_by_adagrad_memory`, then the learning rate.

        w <- w - learning_rate sqrt(h) / (h + penalty) g        or its full form

    By default it is AdaGrad, started at zero, without its epsilon.

    Args:
        learning_rate: a number or a schedule.
        form, penalty, dimension_numbers: as of `scale_by_adagrad_memory`.

    Returns:
        An optimizer of parameters of any shapes; kernels are (in, out).

    Raises:
        UserError: a hyperparameter is not finite or out of range, or dimension numbers do not fit a parameter.

    Source: NL Eq. 101-111; Duchi et al., JMLR 2011.

    >>> rule = adagrad_memory(1.0, "full")
    >>> print(rule.update(jnp.array([3.0, 4.0]), rule.init(jnp.zeros(2)))[0].round(3))
    [-0.6 -0.8]
    """
    check("adagrad_memory", learning_rate=learning_rate)
    rule = scale_by_adagrad_memory(form, penalty=penalty, dimension_numbers=dimension_numbers)
    return optax.chain(rule, optax.scale_by_learning_rate(learning_rate))
