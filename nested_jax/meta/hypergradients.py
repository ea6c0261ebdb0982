"""Value and gradient of a level's result by the state of the level above it: unrolled, truncated or implicit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.checks import Interval, allows
from nested_jax.errors import UserError, assert_choice, is_whole
from nested_jax.level import Level, run
from nested_jax.meta.bilevel import Descent, assert_smooth, straight_through
from nested_jax.meta.implicit import Solver, System, at_fixed_point, wide
from nested_jax.numerics import vary
from nested_jax.remat import Checkpoint, fit_checkpoint, scan, stream_length
from nested_jax.typing import Array, Float, PyTree


class Hypergradient(NamedTuple):
    """What `hypergradient` returns.

    Args:
        value: the outer loss, a scalar.
        gradient: its derivative by meta, a tree of the shapes of meta.
        fixed_point_residual: |step(s) - s| / |s| for the final state s of an implicit hypergradient, or |condition| / |s|,
            otherwise 0.
        linear_residual: |A^T u - v| / |v| of the implicit linear system, otherwise 0.
        aux: what the outer loss returns in addition to its value; None without `has_aux`.

    >>> import optax
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
    aux: PyTree = None


def hypergradient(
    outer_loss: Callable[..., PyTree],
    inner_level: Level,
    *,
    truncate: int | None = None,
    implicit: Literal["symmetric", "general"] | None = None,
    condition: Callable[[PyTree, PyTree, PyTree], PyTree] | None = None,
    solver: Solver | None = None,
    has_aux: bool = False,
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

            One linear system, solved in at least float32 by conjugate gradients, replaces the unrolled loop, and no states
            are kept. "symmetric": J is symmetric with eigenvalues below 1, as of gradient descent without momentum.
            "general": any J, by normal equations. Emitted values are constants and the start has no derivative, so the
            inner loss must depend on meta, as implicit MAML's penalty on the distance to meta does.
        condition: (state, tick, meta) -> residual, of the state's structure, which is zero at the solution and takes the
            place of s - step(s). Of a `descent` it is (params, batch, meta) -> residual of the structure of the parameters,
            such as the gradient of its loss. "symmetric" then means its derivative by the first argument.
        solver: of the linear system A^T u = v, in place of conjugate gradients: (u -> A^T u, v) -> u, or a solver of lineax.
        has_aux: outer_loss returns (scalar, aux), which is returned, such as the final state.
        checkpoint: what the backward pass keeps, in ticks of the level or of a window, as of `unroll`.
        iterations: maximal number of conjugate gradient iterations.
        tolerance: of conjugate gradients, relative to the right side, in [0, 1).

    Returns:
        (meta, stream, *others, state=None) -> `Hypergradient`; stream has leaves (T, ...). A state given is where the level
        starts instead of init(meta), as a constant: online, windows of a stream that go on from each other.

    Raises:
        UserError: the inner level is no `Level`; implicit is unknown or combined with truncate; condition or solver without
            it; truncate or iterations are no whole numbers from 1; the tolerance is not in [0, 1); meta has a leaf that is
            no float; with truncate or implicit, the stream ends inside a tick of the level. With implicit: the level is
            first-order; "symmetric" of a `descent` whose state has floats other than the parameters, such as a momentum, or,
            outside `jit`, of any J that is not (inside, the gradient is NaN); a leaf of meta on which nothing depends; a
            condition of other shapes.

    Source: Shaban et al., arXiv 1810.10667 (truncation); Rajeswaran et al., arXiv 1909.04630 (implicit MAML); Blondel et
    al., arXiv 2105.15183 (optimality conditions).

    The derivative by the strength of a penalty. The inner level takes 200 steps on (w - 1)^2 / 2 + meta w^2 / 2:

    >>> import optax
    >>> from nested_jax.meta import descent
    >>> fit = lambda w, x, penalty: ((w - x) ** 2 + penalty * w**2) / 2
    >>> level = descent(fit, optax.sgd(0.1), start=lambda meta: jnp.zeros(()))
    >>> outer = lambda meta, state, emitted: (state.params - 0.5) ** 2 / 2
    >>> for how in ({}, {"implicit": "symmetric"}, {"implicit": "symmetric", "condition": jax.grad(fit)}):
    ...     result = hypergradient(outer, level, **how)(3.0, jnp.ones(200))
    ...     print(result.gradient.round(6))  # (1 / (1 + meta) - 1 / 2) times -1 / (1 + meta)^2
    0.015625
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
    if (condition or solver) and not implicit:
        raise UserError(
            "hypergradient: condition and solver are of implicit='symmetric' or 'general': give one of these too"
        )
    if implicit and inner_level.first_order and not condition:
        raise UserError(
            f"hypergradient: level {inner_level.name!r} is first-order, so its step lacks the derivative that implicit "
            "needs: make it without first_order, or give a condition"
        )
    if not is_whole(iterations) or not allows(Annotated[float, Interval(least=0, below=1)], tolerance):
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

    def unrolled(meta, stream, others, state):
        slower = (meta,)
        state = vary(inner_level.init(slower) if state is None else state, stream)
        if truncate is None:
            state, emitted = run(inner_level, state, stream, slower=slower, checkpoint=checkpoint)
            return outer(meta, state, emitted, *others)

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
        return outer(meta, state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs), *others)

    def implicitly(meta, stream, others, state):
        ticks = ticks_of(stream)
        state = vary(inner_level.init((meta,)) if state is None else state, stream)
        state, emitted = run(inner_level, state, stream, slower=(meta,))
        tick = wide(jax.tree.map(lambda x: jnp.asarray(x)[-1], ticks))
        of_params = condition is not None and isinstance(state, Descent)
        solved = state.params if of_params else state
        leaves, structure = jax.tree.flatten(solved)
        smooth = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        if implicit == "symmetric" and isinstance(state, Descent) and len(smooth) > len(jax.tree.leaves(state.params)):
            raise UserError(
                f"hypergradient: implicit='symmetric', but level {inner_level.name!r} has floats other than its parameters, "
                "such as a momentum, so the derivative of its step is not: give 'general', or the condition jax.grad(loss)"
            )

        def fill(point):
            filled = list(leaves)
            for i, leaf in zip(smooth, point, strict=True):
                filled[i] = leaf
            return structure.unflatten(filled)

        def residual(point, meta):
            if condition is None:
                after, _ = inner_level.step(fill(point), tick, (meta,))
                return [x - jax.tree.leaves(after)[i] for x, i in zip(point, smooth, strict=True)]
            context = jax.tree.map(lambda x: x[0], tick) if of_params else tick
            zero = condition(fill(point), context, meta)
            if jax.tree.map(jnp.shape, zero) != jax.tree.map(jnp.shape, solved):
                shapes = [jax.tree.map(jnp.shape, tree) for tree in (zero, solved)]
                raise UserError(
                    "hypergradient: the condition returns shapes {}: return those of its first argument, {}".format(*shapes)
                )
            return [jax.tree.leaves(zero)[i] for i in smooth]

        judged = lambda point, meta: outer(
            meta, state._replace(params=fill(point)) if of_params else fill(point), emitted, *others
        )
        system = System(implicit == "symmetric", solver, iterations, tolerance)
        (value, aux), gradient, residuals = at_fixed_point(judged, residual, [leaves[i] for i in smooth], meta, system)
        return Hypergradient(value, gradient, *residuals, aux)

    outer = outer_loss if has_aux else lambda *arguments: (outer_loss(*arguments), None)

    def value_and_gradient(meta, stream, *others, state=None):
        meta = jax.tree.map(jnp.asarray, meta)
        assert_smooth("hypergradient: meta", meta)
        if implicit:
            return implicitly(meta, stream, others, state)
        (value, aux), gradient = jax.value_and_grad(unrolled, has_aux=True)(meta, stream, others, state)
        return Hypergradient(value, gradient, jnp.zeros(()), jnp.zeros(()), aux)

    return value_and_gradient
