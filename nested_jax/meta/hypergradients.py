"""Value and gradient of a level's result by the state of the level above it: unrolled, truncated or implicit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.sparse.linalg import cg

from nested_jax.errors import UserError, assert_choice, is_whole
from nested_jax.level import Level, run
from nested_jax.meta.bilevel import assert_smooth, straight_through
from nested_jax.remat import Checkpoint, fit_checkpoint, scan, stream_length
from nested_jax.typing import Array, Float, PyTree


class Hypergradient(NamedTuple):
    """What `hypergradient` returns.

    Args:
        value: the outer loss, a scalar.
        gradient: its derivative by meta, a tree of the shapes of meta.
        fixed_point_residual: |step(s) - s| / |s| for the final state s of an implicit hypergradient, otherwise 0.
        linear_residual: |(I - J)^T u - v| / |v| of the implicit linear system, otherwise 0.

    >>> from nested_jax.meta import descent
    >>> level = descent(lambda w, x, meta: (w - x) ** 2 / 2, optax.sgd(0.5))
    >>> result = hypergradient(lambda meta, state, emitted: state.params, level)(1.0, jnp.zeros(3))
    >>> print(result.value, result.gradient, result.fixed_point_residual, result.linear_residual)
    0.125 0.125 0.0 0.0
    """

    value: Float[Array, ""]
    gradient: PyTree
    fixed_point_residual: Float[Array, ""]
    linear_residual: Float[Array, ""]


def hypergradient(
    outer_loss: Callable[..., Float[Array, ""]],
    inner_level: Level,
    *,
    truncate: int | None = None,
    implicit: Literal["symmetric", "general"] | None = None,
    checkpoint: Checkpoint = "sqrt",
    iterations: int = 100,
    tolerance: float = 1e-6,
) -> Callable[..., Hypergradient]:
    """Value and gradient of a loss of a level's final state, with respect to the state of the level above it.

        s_0 = init(meta)        s_t, y_t = step(s_{t-1}, x_t, meta)        d outer_loss(meta, s_T, y_1 ... y_T) / d meta

    Args:
        outer_loss: (meta, state, emitted, *others) -> scalar, with emitted as `run` returns it; with `truncate`, stacked.
        inner_level: any `Level` that has meta as its slower level's state, such as `descent`, a CMS or a memory.
        truncate: length of windows, in ticks, that derivatives do not leave (truncated back-propagation through time). The
            derivative by a window's first state is added to the start's. Windows end at the last tick; the first one may be
            shorter.
        implicit: differentiate the fixed point s = step(s, x_T, meta) by the implicit function theorem:

                d s / d meta = (I - J)^-1 d step / d meta        J = d step / d s

            One linear system, solved by conjugate gradients, replaces the unrolled loop, and no states are kept.
            "symmetric": J is symmetric with eigenvalues below 1, as of a step of gradient descent. "general": any J, by
            normal equations. Emitted values are constants and the start has no derivative, so the inner loss must depend on
            meta, as implicit MAML's penalty on the distance to meta does. A first-order `descent` has the wrong J.
        checkpoint: what the backward pass keeps, in ticks of the level or of a window, as of `unroll`.
        iterations: maximal number of conjugate gradient iterations.
        tolerance: of conjugate gradients, relative to the right side, in [0, 1).

    Returns:
        (meta, stream, *others) -> `Hypergradient`; stream has leaves (T, ...).

    Raises:
        UserError: the inner level is no `Level`; implicit is unknown or combined with truncate; truncate or iterations are
            no whole numbers from 1; the tolerance is not in [0, 1); meta has a leaf that is no float; with truncate or
            implicit, the stream ends inside a tick of the level.

    Source: Shaban et al., arXiv 1810.10667 (truncation); Rajeswaran et al., arXiv 1909.04630 (implicit MAML).

    The derivative by the strength of a penalty. The inner level takes 200 steps on (w - 1)^2 / 2 + meta w^2 / 2:

    >>> from nested_jax.meta import descent
    >>> fit = lambda w, x, penalty: ((w - x) ** 2 + penalty * w**2) / 2
    >>> level = descent(fit, optax.sgd(0.1), start=lambda meta: jnp.zeros(()))
    >>> outer = lambda meta, state, emitted: (state.params - 0.5) ** 2 / 2
    >>> for implicit in (None, "symmetric"):
    ...     result = hypergradient(outer, level, implicit=implicit)(3.0, jnp.ones(200))
    ...     print(result.gradient.round(6))  # (1 / (1 + meta) - 1 / 2) times -1 / (1 + meta)^2
    0.015625
    0.015625
    """
    assert_choice("hypergradient: implicit", implicit, (None, "symmetric", "general"))
    if not isinstance(inner_level, Level):
        raise UserError(f"hypergradient: {inner_level!r} is no Level: give one, such as nested_jax.meta.descent")
    if truncate is not None and (not is_whole(truncate) or implicit):
        raise UserError(
            f"hypergradient: truncate={truncate!r}, implicit={implicit!r}: give one of them, truncate a whole number from 1"
        )
    if not is_whole(iterations) or not 0 <= tolerance < 1:
        raise UserError(
            f"hypergradient: iterations={iterations!r}, tolerance={tolerance!r}: give a whole number from 1, one in [0, 1)"
        )

    def ticks_of(stream):
        """The stream as (ticks, period, ...)."""
        length, period = stream_length(stream), inner_level.period
        if length % period:
            raise UserError(
                f"hypergradient: {length} data points end inside a tick of level {inner_level.name!r}, whose period is "
                f"{period}: cut the stream, or leave out truncate and implicit"
            )
        return jax.tree.map(lambda x: x.reshape(length // period, period, *x.shape[1:]), stream)

    def unrolled(meta, stream, others):
        state, slower = inner_level.init((meta,)), (meta,)
        if truncate is None:
            state, emitted = run(inner_level, state, stream, slower=slower, checkpoint=checkpoint)
            return outer_loss(meta, state, emitted, *others)

        start, ticks = state, ticks_of(stream)
        step = lambda state, tick: inner_level.step(state, tick, slower)

        def window(state, ticks):
            keep = fit_checkpoint(checkpoint, stream_length(ticks))
            return scan(step, straight_through(start, jax.lax.stop_gradient(state)), ticks, checkpoint=keep)

        first = stream_length(ticks) % truncate
        outputs = []
        if first:
            state, emitted = window(state, jax.tree.map(lambda x: x[:first], ticks))
            outputs.append(emitted)
        if stream_length(ticks) > first:
            windows = jax.tree.map(lambda x: x[first:].reshape(-1, truncate, *x.shape[1:]), ticks)
            keep = checkpoint if checkpoint in ("none", "full") else "sqrt"
            state, emitted = scan(window, state, windows, checkpoint=keep)
            outputs.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), emitted))
        return outer_loss(meta, state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs), *others)

    def implicitly(meta, stream, others):
        ticks = ticks_of(stream)
        state, emitted = run(inner_level, None, stream, slower=(meta,))
        leaves, structure = jax.tree.flatten(state)
        smooth = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

        def fill(point):
            filled = list(leaves)
            for i, leaf in zip(smooth, point, strict=True):
                filled[i] = leaf
            return structure.unflatten(filled)

        def step(point, meta):
            after, _ = inner_level.step(fill(point), jax.tree.map(lambda x: x[-1], ticks), (meta,))
            return [jax.tree.leaves(after)[i] for i in smooth]

        point = [leaves[i] for i in smooth]
        wide = lambda u: [x.astype(jnp.result_type(*point)) for x in u]  # the linear system has one dtype
        narrow = lambda u: [x.astype(leaf.dtype) for x, leaf in zip(u, point, strict=True)]
        outer = lambda point, meta: outer_loss(meta, fill(point), emitted, *others)
        value, (v, direct) = jax.value_and_grad(outer, (0, 1))(point, meta)
        after, pull = jax.vjp(step, point, meta)
        minus = lambda a, b: jax.tree.map(jnp.subtract, a, b)
        adjoint = lambda u: minus(u, wide(pull(narrow(u))[0]))
        # (I - J) u is the transpose of the linear function `adjoint`, so levels need no forward-mode derivative.
        v = wide(v)
        push = jax.linear_transpose(adjoint, v)
        if implicit == "symmetric":
            u, _ = cg(adjoint, v, tol=tolerance, maxiter=iterations)
        else:
            u, _ = cg(lambda u: push(adjoint(u))[0], push(v)[0], tol=tolerance, maxiter=iterations)
        gradient = jax.tree.map(jnp.add, direct, pull(narrow(u))[1])
        residuals = _relative_norm(minus(after, point), point), _relative_norm(minus(adjoint(u), v), v)
        return Hypergradient(value, gradient, *residuals)

    def value_and_gradient(meta, stream, *others):
        meta = jax.tree.map(jnp.asarray, meta)
        assert_smooth("hypergradient: meta", meta)
        if implicit:
            return implicitly(meta, stream, others)
        value, gradient = jax.value_and_grad(unrolled)(meta, stream, others)
        return Hypergradient(value, gradient, jnp.zeros(()), jnp.zeros(()))

    return value_and_gradient


def _relative_norm(x: PyTree, y: PyTree) -> Float[Array, ""]:
    """|x| / |y|, infinity for NaN."""
    norm = optax.global_norm(y)
    ratio = optax.global_norm(x) / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
    return jnp.where(jnp.isnan(ratio), jnp.inf, ratio)
