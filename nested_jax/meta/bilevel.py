"""Two levels, the slower of which learns how the faster one learns: MAML and hypergradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.sparse.linalg import cg

from nested_jax.description import Description
from nested_jax.errors import UserError, assert_choice, is_whole
from nested_jax.level import Level, run
from nested_jax.meta.mixflow import mixflow_grad
from nested_jax.meta.unrolling import unroll
from nested_jax.remat import Checkpoint, fit_checkpoint, scan, stream_length
from nested_jax.typing import Array, Float, PyTree

Optimizer = optax.GradientTransformation | Callable[[PyTree], optax.GradientTransformation]


class Descent(NamedTuple):
    """State of `descent`.

    Args:
        params: the parameters.
        optimizer: the optax optimizer's state.

    >>> level = descent(lambda w, x, meta: (w - x) ** 2, optax.sgd(0.1))
    >>> level.init((jnp.ones(2),)).params
    Array([1., 1.], dtype=float32)
    """

    params: PyTree
    optimizer: PyTree


def descent(
    loss: Callable[[PyTree, PyTree, PyTree], Float[Array, ""]],
    optimizer: Optimizer,
    *,
    start: Callable[[PyTree], PyTree] = lambda meta: meta,
    first_order: bool = False,
    name: str = "descent",
) -> Level:
    """Gradient descent as a level, whose start, loss and optimizer a slower level can learn.

        g_t = grad_params loss(params_{t-1}, x_t, meta)        params_t = params_{t-1} + update(g_t)

    meta is the state of the next slower level (`slower[0]`). One data point of the stream is one batch.

    Args:
        loss: (params, batch, meta) -> scalar.
        optimizer: an optax transformation, or meta -> one, for learned rates, gates or starts of a deep momentum. Its
            `update` receives optax's extra arguments `value`, `grad` and `value_fn`.
        start: meta -> initial parameters, a tree of floats of any shapes.
        first_order: treat g_t as a constant in derivatives (first-order MAML).
        name: of the level, in tables and errors.

    Returns:
        A `Level` of period 1 with state `Descent`. It emits the loss of every batch before its step, shape (1,).

    Raises:
        UserError: the optimizer is neither; when the level is initialised, a parameter is no float.

    Source: NL Eq. 72 (knowledge transfer by initialisation); MAML, arXiv 1703.03400.

    >>> level = descent(lambda w, x, meta: (w - x) ** 2 / 2, lambda meta: optax.sgd(meta["rate"]), start=lambda m: m["w"])
    >>> state, losses = run(level, None, jnp.ones(3), slower=({"w": jnp.zeros(()), "rate": 0.5},))
    >>> print(state.params, losses)  # the last axis has one loss a step
    0.875 [[0.5    ]
     [0.125  ]
     [0.03125]]
    """
    fixed = isinstance(optimizer, optax.GradientTransformation)
    if not fixed and not callable(optimizer):
        raise UserError(f"{name}: {optimizer!r} is no optax transformation: give one, or a function that returns one")

    def rule(slower):
        made = optimizer if isinstance(optimizer, optax.GradientTransformation) else optimizer(slower[0])
        return optax.with_extra_args_support(made)

    def init(slower):
        params = start(slower[0])
        _assert_smooth(f"{name}: parameters", params)
        return Descent(params, rule(slower).init(params))

    def step(state, context, slower):
        batch = jax.tree.map(lambda x: x[0], context)

        def loss_and_aux(params):
            value = loss(params, batch, slower[0])
            return value, value

        gradient, value = mixflow_grad(loss_and_aux, has_aux=True)(state.params)
        if first_order:
            gradient = jax.lax.stop_gradient(gradient)
        extra = {"value": value, "grad": gradient, "value_fn": lambda params: loss_and_aux(params)[0]}
        updates, memory = rule(slower).update(gradient, state.optimizer, state.params, **extra)
        return Descent(optax.apply_updates(state.params, updates), memory), value[None]

    description = Description(
        "the loss of a batch",
        "" if fixed else "an optax rule of the slower level's state",
        "batches",
        "initialisation: the slower level gives the start",
        inner=(optimizer,) if fixed else (),
    )
    return Level(init, step, 1, name, description=description)


def maml(
    inner_loss: Callable[[PyTree, PyTree], Float[Array, ""]],
    inner_optimizer: Optimizer,
    steps: int,
    *,
    first_order: bool = False,
    truncate: int | None = None,
    checkpoint: Checkpoint = "sqrt",
) -> Callable[..., PyTree]:
    """Adaptation to a task as a differentiable function: model-agnostic meta-learning.

        params_0 = start        params_t = params_{t-1} + update(grad inner_loss(params_{t-1}, task))

    Args:
        inner_loss: (params, task) -> scalar; a task is any pytree of arrays, the same at every step.
        inner_optimizer: an optax transformation, or hyper -> one.
        steps: T, number of adaptation steps, at least 0; 0 returns the start.
        first_order: inner gradients are constants in derivatives, so no second derivatives are computed.
        truncate: number of last steps that derivatives pass through, from 0 to T. The derivative by the parameters before
            them becomes the start's. With 0 that is the identity, and the derivative by hyper is zero. None: all steps.
        checkpoint: what the backward pass keeps, as of `unroll`.

    Returns:
        adapt(start, task, hyper=None) -> adapted parameters, of the start's structure and shapes. It is differentiable with
        respect to start and to hyper, a pytree such as learned rates, and can be mapped over tasks by `jax.vmap`.

    Raises:
        UserError: steps or truncate are no whole numbers from 0, or truncate exceeds steps; the optimizer is neither; it is
            a function of hyper and `adapt` receives none; a parameter is no float.

    Source: Finn et al., arXiv 1703.03400; Shaban et al., arXiv 1810.10667 (truncation).

    One step towards the task, with a learned rate:

    >>> adapt = maml(lambda w, task: (w - task) ** 2 / 2, lambda hyper: optax.sgd(hyper["rate"]), steps=1)
    >>> outer = lambda start, hyper: (adapt(start, 3.0, hyper) - 3.0) ** 2 / 2
    >>> start, hyper = jax.grad(outer, argnums=(0, 1))(1.0, {"rate": 0.1})
    >>> print(start, hyper["rate"])  # -(1 - rate)^2 2, -(1 - rate) 2^2
    -1.62 -3.6
    """
    last = steps if truncate is None else truncate
    if not is_whole(steps, 0) or not is_whole(last, 0) or last > steps:
        raise UserError(
            f"maml: steps={steps!r}, truncate={truncate!r}: give whole numbers, steps from 0, truncate from 0 to steps"
        )
    fixed = isinstance(inner_optimizer, optax.GradientTransformation)
    level = descent(
        lambda params, task, meta: inner_loss(params, task),
        (lambda meta: inner_optimizer(meta[1])) if callable(inner_optimizer) else inner_optimizer,
        start=lambda meta: meta[0],
        first_order=first_order,
        name="maml",
    )

    def adapt(start, task, hyper=None):
        if not fixed and hyper is None:
            raise UserError("maml: the inner optimizer is a function of hyper: give adapt(start, task, hyper)")
        start = jax.tree.map(jnp.asarray, start)

        slower = ((start, hyper),)
        context = jax.tree.map(lambda x: jnp.asarray(x)[None], task)
        step = lambda state, _: (level.step(state, context, slower)[0], None)
        advance = lambda state, n, keep: unroll(step, state, jnp.arange(n), checkpoint=keep)[0] if n else state
        state = level.init(slower)
        if last < steps:
            state = _straight_through(state, jax.lax.stop_gradient(advance(state, steps - last, "sqrt")))
        return advance(state, last, checkpoint).params

    return adapt


class Hypergradient(NamedTuple):
    """What `hypergradient` returns.

    Args:
        value: the outer loss, a scalar.
        gradient: its derivative by meta, a tree of the shapes of meta.
        fixed_point_residual: |step(s) - s| / |s| for the final state s of an implicit hypergradient, otherwise 0.
        linear_residual: |(I - J)^T u - v| / |v| of the implicit linear system, otherwise 0.

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
            return scan(step, _straight_through(start, jax.lax.stop_gradient(state)), ticks, checkpoint=keep)

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
        _assert_smooth("hypergradient: meta", meta)
        if implicit:
            return implicitly(meta, stream, others)
        value, gradient = jax.value_and_grad(unrolled)(meta, stream, others)
        return Hypergradient(value, gradient, jnp.zeros(()), jnp.zeros(()))

    return value_and_gradient


def _straight_through(start: PyTree, state: PyTree) -> PyTree:
    """The values of the state with the derivatives of the start."""
    return jax.tree.map(lambda a, b: _with_derivative_of(a, b) if jnp.issubdtype(b.dtype, jnp.inexact) else b, start, state)


@jax.custom_jvp
def _with_derivative_of(a: Array, b: Array) -> Array:
    """b with the derivative of a, without arithmetic: b may be infinite."""
    return b


_with_derivative_of.defjvp(lambda primals, tangents: (primals[1], tangents[0]))


def _relative_norm(x: PyTree, y: PyTree) -> Float[Array, ""]:
    """|x| / |y|, infinity for NaN."""
    norm = optax.global_norm(y)
    ratio = optax.global_norm(x) / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
    return jnp.where(jnp.isnan(ratio), jnp.inf, ratio)


def _assert_smooth(what: str, tree: PyTree) -> None:
    """Raises UserError for the first leaf without a derivative."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(dtype := jnp.result_type(leaf), jnp.inexact):
            raise UserError(f"{what}{jax.tree_util.keystr(path)} is {dtype}: make it a float, or close over it")
