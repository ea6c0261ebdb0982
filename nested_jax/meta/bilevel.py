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
from nested_jax.remat import Checkpoint, scan, stream_length, within
from nested_jax.typing import Array, Float, PyTree

Rule = optax.GradientTransformation | Callable[[PyTree], optax.GradientTransformation]


class Descent(NamedTuple):
    """State of a level that descends: its parameters and what its optax rule remembers."""

    params: PyTree
    rule: PyTree


def descent(
    loss: Callable[[PyTree, PyTree, PyTree], Float[Array, ""]],
    optimizer: Rule,
    *,
    start: Callable[[PyTree], PyTree] = lambda meta: meta,
    first_order: bool = False,
    name: str = "descent",
) -> Level:
    """Gradient descent as a level, which a slower level can learn how to do.

        g_t = grad_params loss(params_{t-1}, x_t, meta)        params_t = params_{t-1} + update(g_t)

    meta is the state of the next slower level (`slower[0]`). One data point of the stream is one batch.

    Args:
        loss: (params, batch, meta) -> scalar.
        optimizer: an optax transformation, or meta -> one: learned rates, gates, the start of a deep momentum. It is given
            optax's extra arguments `value`, `grad` and `value_fn`.
        start: meta -> the parameters to start from.
        first_order: take g_t for a constant in derivatives (first-order MAML).
        name: of the level, in tables and errors.

    Returns:
        A `Level` of period 1, which emits the loss of every batch before its step.

    Raises:
        UserError: an optimizer that is neither; a parameter of the start that is no float, when the level begins.

    Source: NL Eq. 72 (knowledge transfer by initialisation); MAML, arXiv 1703.03400.

    >>> level = descent(lambda w, x, meta: (w - x) ** 2 / 2, lambda meta: optax.sgd(meta["rate"]), start=lambda m: m["w"])
    >>> state, losses = run(level, None, jnp.ones(3), slower=({"w": jnp.zeros(()), "rate": 0.5},))
    >>> print(state.params, losses)  # the last axis is of a step's losses, here one
    0.875 [[0.5    ]
     [0.125  ]
     [0.03125]]
    """
    given = isinstance(optimizer, optax.GradientTransformation)
    if not given and not callable(optimizer):
        raise UserError(f"{name}: {optimizer!r} is no optax transformation: give one, or a function that makes one")
    rule = lambda slower: optax.with_extra_args_support(optimizer if given else optimizer(slower[0]))

    def init(slower):
        params = start(slower[0])
        _assert_smooth(f"{name}: parameters", params)
        return Descent(params, rule(slower).init(params))

    def step(state, context, slower):
        batch = jax.tree.map(lambda x: x[0], context)

        def valued(params):
            value = loss(params, batch, slower[0])
            return value, value

        gradient, value = mixflow_grad(valued, has_aux=True)(state.params)
        if first_order:
            gradient = jax.lax.stop_gradient(gradient)
        extra = {"value": value, "grad": gradient, "value_fn": lambda params: valued(params)[0]}
        updates, memory = rule(slower).update(gradient, state.rule, state.params, **extra)
        return Descent(optax.apply_updates(state.params, updates), memory), value[None]

    says = Description(
        "the loss of a batch",
        "" if given else "an optax rule of the slower level's state",
        "batches",
        "initialisation: the slower level gives the start",
        inner=(optimizer,) if given else (),
    )
    return Level(init, step, 1, name, description=says)


def maml(
    inner_loss: Callable[[PyTree, PyTree], Float[Array, ""]],
    inner_optimizer: Rule,
    steps: int,
    *,
    first_order: bool = False,
    truncate: int | None = None,
    checkpoint: Checkpoint = "sqrt",
) -> Callable[..., PyTree]:
    """Adaptation to a task as a function that can be differentiated: model-agnostic meta-learning.

        params_0 = start        params_t = params_{t-1} + update(grad inner_loss(params_{t-1}, task))

    Args:
        inner_loss: (params, task) -> scalar; a task is whatever the loss needs, the same at every step.
        inner_optimizer: an optax transformation, or hyper -> one.
        steps: T, of adaptation; 0 returns the start.
        first_order: inner gradients are constants in derivatives, so that no second derivatives are taken.
        truncate: derivatives pass through the last so many steps alone; the start receives what reaches the first of them,
            as if it had been the start. 0 is first-order for the start, and nothing for hyper.
        checkpoint: what the backward pass keeps, see `unroll`.

    Returns:
        adapt(start, task, hyper=None) -> adapted parameters. Take gradients of any loss of them, with respect to start and
        to hyper, a pytree (learned rates, gates, the start of a deep momentum); `jax.vmap` it over tasks.

    Raises:
        UserError: steps or truncate no whole number from 0, or truncate more than steps; an optimizer that is neither, or a
            function of a hyper that `adapt` is not given; a parameter that is no float.

    Source: Finn et al., arXiv 1703.03400; Shaban et al., arXiv 1810.10667 (truncation).

    One step towards the task with a rate that is learned too:

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
    given = isinstance(inner_optimizer, optax.GradientTransformation)
    level = descent(
        lambda params, task, meta: inner_loss(params, task),
        (lambda meta: inner_optimizer(meta[1])) if callable(inner_optimizer) else inner_optimizer,
        start=lambda meta: meta[0],
        first_order=first_order,
        name="maml",
    )

    def adapt(start, task, hyper=None):
        if not given and hyper is None:
            raise UserError("maml: the inner optimizer is a function of hyper: give adapt(start, task, hyper)")
        start = jax.tree.map(jnp.asarray, start)

        def advance(state, count, keep, slower, task):
            context = jax.tree.map(lambda x: jnp.asarray(x)[None], task)
            step = lambda state, _: (level.step(state, context, slower)[0], None)
            return unroll(step, state, jnp.arange(count), checkpoint=keep)[0] if count else state

        slower = ((start, hyper),)
        state = level.init(slower)
        if last < steps:
            held = advance(state, steps - last, "sqrt", slower, task)
            state = _passed_on(state, jax.lax.stop_gradient(held))
        return advance(state, last, checkpoint, slower, task).params

    return adapt


class Hypergradient(NamedTuple):
    """What `hypergradient` returns.

    value: the outer loss. gradient: its derivative, as meta. unsettled: of an implicit one, how much one more tick moves the
    state, relative to it; unsolved: what remains of its linear system, relative to its right side. 0 without `implicit`.
    """

    value: Float[Array, ""]
    gradient: PyTree
    unsettled: Float[Array, ""]
    unsolved: Float[Array, ""]


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
    """Value and gradient of a loss of what a level has learned, with respect to the state of the level above it.

        s_0 = init(meta)        s_t, y_t = step(s_{t-1}, x_t, meta)        d outer_loss(meta, s_T, y_1 ... y_T) / d meta

    Args:
        outer_loss: (meta, state, emitted, *what else) -> scalar; emitted as `run` returns it, without `truncate` and
            `implicit`.
        inner_level: any `Level`, with meta as its slower level's state, such as `descent`, a CMS or a memory.
        truncate: derivatives do not pass from one window of so many ticks to the next (truncated back-propagation through
            time, windows counted from the end). What reaches a window's first state is passed on to the start, as if that
            had been it. The number must divide the ticks, or the first window is shorter.
        implicit: the state has settled, s = step(s, x_T, meta): by the implicit function theorem

                d s / d meta = (I - J)^-1 d step / d meta        J = d step / d s

            one linear system in place of the unrolled loop, solved by conjugate gradients; nothing of the loop is kept.
            "symmetric": J is symmetric with eigenvalues below 1, as of a step of gradient descent. "general": any J, by
            normal equations. What the level emits is a constant, and the start receives nothing: a loss that holds the
            state near meta, as of implicit MAML, tells meta where to be. The step needs its true derivative J: a
            first-order `descent` has none.
        checkpoint: what the backward pass keeps, in ticks of the level (of a window), see `unroll`.
        iterations, tolerance: of conjugate gradients: at most so many, until what remains is so small a part.

    Returns:
        (meta, stream, *what else) -> `Hypergradient`.

    Raises:
        UserError: something else than a level, an unknown `implicit`, one beside `truncate`, a `truncate` or `iterations`
            that is no whole number from 1, a tolerance not in [0, 1), a meta that is no float, a stream cut short inside a
            tick of the level under either.

    Source: Shaban et al., arXiv 1810.10667 (truncation); Rajeswaran et al., arXiv 1909.04630 (implicit MAML).

    The best strength of a penalty, whose fit is found by 200 steps of gradient descent on (w - 1)^2 / 2 + meta w^2 / 2:

    >>> fit = lambda w, x, penalty: ((w - x) ** 2 + penalty * w**2) / 2
    >>> level = descent(fit, optax.sgd(0.1), start=lambda meta: jnp.zeros(()))
    >>> outer = lambda meta, state, emitted: (state.params - 0.5) ** 2 / 2
    >>> for implicit in (None, "symmetric"):
    ...     found = hypergradient(outer, level, implicit=implicit)(3.0, jnp.ones(200))
    ...     print(found.gradient.round(6))  # (1 / (1 + meta) - 1 / 2) times -1 / (1 + meta)^2
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
            f"hypergradient: iterations={iterations!r}, tolerance={tolerance!r}: give a whole number from 1, a part below 1"
        )

    def whole(stream):
        """The stream in ticks of the level."""
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

        start, ticks = state, whole(stream)
        step = lambda state, tick: inner_level.step(state, tick, slower)

        def window(state, some):
            keep = within(checkpoint, stream_length(some))
            return scan(step, _passed_on(start, jax.lax.stop_gradient(state)), some, checkpoint=keep)

        windows = checkpoint if checkpoint in ("none", "full") else "sqrt"
        first = stream_length(ticks) % truncate
        cut = jax.tree.map(lambda x: x[first:].reshape(-1, truncate, *x.shape[1:]), ticks)
        pieces = []
        if first:
            state, emitted = window(state, jax.tree.map(lambda x: x[:first], ticks))
            pieces.append(emitted)
        if stream_length(ticks) > first:
            state, emitted = scan(window, state, cut, checkpoint=windows)
            pieces.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), emitted))
        return outer_loss(meta, state, jax.tree.map(lambda *each: jnp.concatenate(each), *pieces), *others)

    def settled(meta, stream, others):
        ticks = whole(stream)
        state, emitted = run(inner_level, None, stream, slower=(meta,))
        leaves, structure = jax.tree.flatten(state)
        smooth = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

        def fill(point):
            whole = list(leaves)
            for i, leaf in zip(smooth, point, strict=True):
                whole[i] = leaf
            return structure.unflatten(whole)

        def step(point, meta):
            after, _ = inner_level.step(fill(point), jax.tree.map(lambda x: x[-1], ticks), (meta,))
            return [jax.tree.leaves(after)[i] for i in smooth]

        point = [leaves[i] for i in smooth]
        wide = lambda u: [x.astype(jnp.result_type(*point)) for x in u]  # the linear system is of one type
        narrow = lambda u: [x.astype(leaf.dtype) for x, leaf in zip(u, point, strict=True)]
        outer = lambda point, meta: outer_loss(meta, fill(point), emitted, *others)
        value, (v, direct) = jax.value_and_grad(outer, (0, 1))(point, meta)
        moved, pull = jax.vjp(step, point, meta)
        minus = lambda a, b: jax.tree.map(jnp.subtract, a, b)
        adjoint = lambda u: minus(u, wide(pull(narrow(u))[0]))
        # The derivative along w as the transpose of a pull-back, which is linear: levels need no forward mode of their own.
        v = wide(v)
        push = jax.linear_transpose(adjoint, v)
        if implicit == "symmetric":
            u, _ = cg(adjoint, v, tol=tolerance, maxiter=iterations)
        else:
            u, _ = cg(lambda u: push(adjoint(u))[0], push(v)[0], tol=tolerance, maxiter=iterations)
        gradient = jax.tree.map(jnp.add, direct, pull(narrow(u))[1])
        return Hypergradient(value, gradient, _share(minus(moved, point), point), _share(minus(adjoint(u), v), v))

    def found(meta, stream, *others):
        meta = jax.tree.map(jnp.asarray, meta)
        _assert_smooth("hypergradient: meta", meta)
        if implicit:
            return settled(meta, stream, others)
        value, gradient = jax.value_and_grad(unrolled)(meta, stream, others)
        return Hypergradient(value, gradient, jnp.zeros(()), jnp.zeros(()))

    return found


def _passed_on(start: PyTree, state: PyTree) -> PyTree:
    """A state that is a constant, but for its derivative: that of the start."""
    return jax.tree.map(lambda a, b: _instead(a, b) if jnp.issubdtype(b.dtype, jnp.inexact) else b, start, state)


@jax.custom_jvp
def _instead(a: Array, b: Array) -> Array:
    """b, with the derivative of a: no arithmetic, so that infinities stay what they are."""
    return b


_instead.defjvp(lambda primals, tangents: (primals[1], tangents[0]))


def _share(part: PyTree, of: PyTree) -> Float[Array, ""]:
    """How large a part is; infinite where it is no number."""
    size = optax.global_norm(of)
    share = optax.global_norm(part) / jnp.maximum(size, jnp.finfo(size.dtype).tiny)
    return jnp.where(jnp.isnan(share), jnp.inf, share)


def _assert_smooth(what: str, tree: PyTree) -> None:
    """Raises UserError for the first leaf without a derivative."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(dtype := jnp.result_type(leaf), jnp.inexact):
            raise UserError(f"{what}{jax.tree_util.keystr(path)} is {dtype}: make it a float, or close over it")
