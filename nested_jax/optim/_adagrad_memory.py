"""AdaGrad as a memory of gradients without decay: element by element, or with whole outer products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

from nested_jax.description import Description
from nested_jax.errors import assert_choice
from nested_jax.numerics import bounded, safe_divide, safe_sqrt, split_scale, vary, zeros
from nested_jax.optim._hyperparameters import NON_NEGATIVE, check
from nested_jax.optim._precision import at_rate, in_float32
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
    zero. Where squares overflow it emits zero, as AdaGrad.

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

    def element(h, g):
        root = safe_sqrt(h)
        return safe_divide(g, jnp.where(h == 0, 0, root + safe_divide(penalty, root)))

    def matrix(h, g):
        return _root_over(h, penalty) @ g if g.size else g

    def init(params):
        memory = zeros(params)
        return AdagradMemoryState(memory if form == "diagonal" else jax.tree.map(_outer, columns(memory)))

    def update(updates, state, params=None):
        del params
        if form == "diagonal":
            squares = jax.tree.map(lambda h, g: h + jnp.square(g), state.squares, updates)
            emitted = jax.tree.map(element, squares, updates)
        else:
            updates = vary(updates, state.squares)
            matrices, transpose = jax.vjp(columns, updates)  # a permutation of entries: its transpose is its inverse
            squares = jax.tree.map(lambda h, x: bounded(h + x, h, x), state.squares, jax.tree.map(_outer, matrices))
            (emitted,) = transpose(jax.tree.map(matrix, squares, matrices))
        return emitted, AdagradMemoryState(optax.tree.cast_like(squares, state.squares))

    return in_float32(optax.GradientTransformation(init, update))


def _outer(g: Float[Array, "*batch N M"]) -> Float[Array, "*batch N N"]:
    g, scale = split_scale(g, (-2, -1))  # so that no infinities of both signs are added
    products = g @ jnp.swapaxes(g, -2, -1)
    return bounded(products * scale * scale, products)


def _columns(dimension_numbers: DimensionNumbers, tree: PyTree) -> PyTree:
    """Every leaf as (..., in, out); a vector (..., in) becomes (..., in, 1)."""
    leaves, structure = jax.tree.flatten(tree)
    column = lambda leaf, numbers: as_matrices(leaf, numbers) if numbers else jnp.atleast_1d(leaf)[..., None]
    return structure.unflatten(map(column, leaves, resolve_dimension_numbers(dimension_numbers, tree)))


def _root_over(H: Float[Array, "*batch N N"], penalty: ArrayLike) -> Float[Array, "*batch N N"]:
    """H^{1/2} (H + penalty I)^{-1} of a positive semi-definite H, zero on its null space, and where its trace overflows."""
    trace = jnp.trace(H, axis1=-2, axis2=-1)[..., None, None]
    fits = ~jnp.isinf(2 * trace)
    H, largest = jnp.where(fits, H, 0), jax.lax.stop_gradient(jnp.maximum(jnp.where(fits, trace, 0), penalty))
    unit = jnp.where(largest == 0, 1, largest)  # of size 1, products of its powers stay in range
    return _shrunk_inverse(H / unit, penalty / unit) * jax.lax.rsqrt(unit)


def _with_derivative(name: str, function: Callable, jvp: Callable) -> Callable:
    """A function of arrays of as many axes, to the type of the first, with a rule for its derivative.

    A primitive, since scans drop the rule of a `jax.custom_jvp` where they are differentiated: second derivatives would be
    those of eigenvectors, which are NaN where eigenvalues are equal.

    Args:
        function: takes any leading axes.
        jvp: (primals, tangents, which may be symbolic zeros) -> (value, its tangent).
    """
    primitive = Primitive(name)

    def batched(values, axes):
        size = next(x.shape[axis] for x, axis in zip(values, axes, strict=True) if axis is not None)
        return primitive.bind(*(batching.bdim_at_front(x, axis, size) for x, axis in zip(values, axes, strict=True))), 0

    primitive.def_impl(jax.jit(function))
    primitive.def_abstract_eval(lambda first, *others: first)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    return primitive.bind


def _shrunk_inverse_jvp(primals, tangents):
    """f is the pseudo-inverse of R + penalty P, where P, of penalty 0, is that of R. Derivatives of all orders follow."""
    (H, penalty), (dH, dpenalty) = primals, map(ad.instantiate_zeros, tangents)
    f, P = _shrunk_inverse(H, penalty), _shrunk_inverse(H, jnp.zeros_like(penalty))
    dR = _root_derivative(H, dH)
    null = jnp.broadcast_to(jnp.eye(H.shape[-1], dtype=H.dtype), H.shape) - _root(H) @ P

    def change(inverse, by):
        across = inverse @ (inverse @ by) @ null
        return across + jnp.swapaxes(across, -2, -1) - inverse @ by @ inverse

    return f, change(f, dR + penalty * change(P, dR) + dpenalty * P)


def _root_jvp(primals, tangents):
    return _root(*primals), _root_derivative(*primals, *tangents)


def _root_derivative(H, dH):
    """X of R X + X R = dH; zero between null vectors of H."""
    values, vectors = _eigen(jax.lax.stop_gradient(H))
    roots, transposed, R = jnp.sqrt(values), jnp.swapaxes(vectors, -2, -1), _root(H)
    sums = roots[..., :, None] + roots[..., None, :]
    solve = lambda _, right: vectors @ safe_divide(transposed @ right @ vectors, sums) @ transposed
    return jax.lax.custom_linear_solve(lambda X: R @ X + X @ R, dH, solve, symmetric=True)


def _of_eigenvalues(function):
    """The matrix with the eigenvectors of H and a function of the square roots of its eigenvalues."""

    def matrix(H, *more):
        values, vectors = _eigen(H)
        return (vectors * function(jnp.sqrt(values)[..., None, :], *more)) @ jnp.swapaxes(vectors, -2, -1)

    return matrix


def _eigen(H):
    values, vectors = jnp.linalg.eigh(H)
    floor = H.shape[-1] * jnp.finfo(H.dtype).eps * jnp.max(values, axis=-1, keepdims=True)
    return jnp.where(values > floor, values, 0), vectors


# R = H^{1/2}, and R (H + penalty I)^{-1}, zero on the null space of H; penalty has the axes of H.
_root = _with_derivative("root", _of_eigenvalues(lambda root: root), _root_jvp)
_shrunk_inverse = _with_derivative(
    "shrunk_inverse",
    _of_eigenvalues(lambda root, penalty: safe_divide(root, jnp.square(root) + penalty)),
    _shrunk_inverse_jvp,
)


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
    return at_rate(rule, learning_rate)
