"""The implicit function theorem at the fixed point of a level: one linear system in place of the unrolled loop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.extend.core import Literal
from jax.scipy.sparse.linalg import cg

from nested_jax.errors import UserError, shown
from nested_jax.typing import Array, Float, PyTree

Solver = Callable[[Callable[[PyTree], PyTree], PyTree], PyTree] | Any  # (function, right side) -> solution, or lineax's


class System(NamedTuple):
    """How the linear system A^T u = v is solved, where A is the derivative of the residual by its point.

    Args:
        symmetric: A is symmetric and positive definite, so that conjugate gradients need no normal equations.
        solver: what does so instead.
        iterations: maximal number of conjugate gradient iterations.
        tolerance: of conjugate gradients, relative to |v|.
    """

    symmetric: bool
    solver: Solver | None
    iterations: int
    tolerance: float


def at_fixed_point(
    outer: Callable[[list[Array], PyTree], tuple[Array, PyTree]],
    residual: Callable[[list[Array], PyTree], list[Array]],
    point: list[Array],
    meta: PyTree,
    system: System,
) -> tuple[tuple[Array, PyTree], PyTree, tuple[Float[Array, ""], Float[Array, ""]]]:
    """(value, aux) of an outer loss, its gradient by meta at a point where the residual is zero, and relative residuals.

        d_meta outer - u^T d_meta residual        A^T u = d_point outer        A = d_point residual

    All of it is computed in at least float32.

    Raises:
        UserError: a leaf of meta moves neither; the system is called symmetric and is not, outside `jit`. Inside, where no
            error can depend on values, the gradient is NaN.
    """
    exact, types = wide(meta), [x.dtype for x in wide(point)]
    one = lambda u: [x.astype(jnp.result_type(*types)) for x in u]  # the linear system has one type
    each = lambda u: [x.astype(dtype) for x, dtype in zip(u, types, strict=True)]
    value, of_outer, aux = jax.vjp(outer, wide(point), exact, has_aux=True)
    v, direct = of_outer(jnp.ones_like(value))
    remains, pull = jax.vjp(lambda point, meta: each(residual(point, meta)), wide(point), exact)
    _assert_moved(meta, _reached(lambda x: of_outer(x)[1], value), _reached(lambda u: pull(u)[1], remains))
    v, adjoint = one(v), lambda u: one(pull(each(u))[0])
    # A u is the transpose of the linear function `adjoint`, so levels need no forward-mode derivative.
    push = lambda u: jax.linear_transpose(adjoint, v)(u)[0]
    u = _solve(adjoint, push, v, system)
    gradient = jax.tree.map(lambda a, b, m: (a - b).astype(m.dtype), direct, pull(each(u))[1], meta)
    if system.symmetric:
        gradient = _refused(_asymmetric(adjoint(v), push(v), v), gradient)
    minus = lambda a, b: jax.tree.map(jnp.subtract, a, b)
    residuals = _relative_norm(remains, wide(point)), _relative_norm(minus(adjoint(u), v), v)
    return (value, aux), gradient, residuals


def wide(tree: PyTree) -> PyTree:
    """Floats in at least float32."""
    widen = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jax.tree.map(lambda x: widen(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree)


def _solve(adjoint: Callable, push: Callable, v: PyTree, system: System) -> PyTree:
    """u with A^T u = v."""
    options = {"tol": system.tolerance, "maxiter": system.iterations}
    if callable(system.solver):
        return system.solver(adjoint, v)
    if system.solver is not None:
        lineax: Any = sys.modules.get("lineax")  # a solver of it has imported it
        if lineax is None or not isinstance(system.solver, lineax.AbstractLinearSolver):
            raise UserError(f"hypergradient: solver {shown(system.solver)}: give a function or one of lineax")
        tags = (lineax.symmetric_tag, lineax.positive_semidefinite_tag) if system.symmetric else ()
        operator = lineax.FunctionLinearOperator(adjoint, jax.eval_shape(lambda: v), tags)
        return lineax.linear_solve(operator, v, system.solver, throw=False).value
    if system.symmetric:
        return cg(adjoint, v, **options)[0]
    return cg(lambda u: push(adjoint(u)), push(v), **options)[0]


def _reached(linear: Callable[[PyTree], PyTree], x: PyTree) -> PyTree:
    """Which outputs of a linear function depend on its input; those that do not are zero."""
    program, shape = jax.make_jaxpr(linear, return_shape=True)(x)
    reached = set(program.jaxpr.invars)
    for eqn in program.jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in reached for v in eqn.invars):
            reached.update(eqn.outvars)
    flags = [not isinstance(v, Literal) and v in reached for v in program.jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shape), flags)


def _assert_moved(meta: PyTree, *moves: PyTree) -> None:
    for (path, _), *flags in zip(jax.tree_util.tree_leaves_with_path(meta), *map(jax.tree.leaves, moves), strict=True):
        if not any(flags):
            raise UserError(
                f"hypergradient: meta{jax.tree_util.keystr(path)} moves neither the fixed point nor the outer loss, so its "
                "implicit derivative is zero: let the inner loss depend on it, close over it, or leave out implicit"
            )


def _asymmetric(transposed: PyTree, direct: PyTree, v: PyTree) -> Array:
    """Whether A^T v and A v differ by more than rounding."""
    norm, difference = optax.global_norm, optax.global_norm(jax.tree.map(jnp.subtract, transposed, direct))
    eps = jnp.finfo(difference.dtype).eps
    return difference > eps**0.5 * norm(transposed) + 100 * eps * norm(v)


def _refused(asymmetric: Array, gradient: PyTree) -> PyTree:
    if isinstance(asymmetric, Tracer):
        return jax.tree.map(lambda x: jnp.where(asymmetric, jnp.nan, x), gradient)
    if asymmetric:
        raise UserError(
            "hypergradient: implicit='symmetric', but the level's step has a derivative that is not: give 'general'"
        )
    return gradient


def _relative_norm(x: PyTree, y: PyTree) -> Float[Array, ""]:
    """|x| / |y|, infinity for NaN."""
    norm = optax.global_norm(y)
    ratio = optax.global_norm(x) / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
    return jnp.where(jnp.isnan(ratio), jnp.inf, ratio)
