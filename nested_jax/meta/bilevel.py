"""Gradient descent as a level, whose start, loss and optimizer a slower level learns: MAML."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.description import Description
from nested_jax.errors import UserError, is_whole, shown
from nested_jax.level import Level
from nested_jax.meta.mixflow import mixflow_grad
from nested_jax.meta.unrolling import unroll
from nested_jax.numerics import vary
from nested_jax.remat import Checkpoint, with_tangent_of
from nested_jax.typing import PyTree

Optimizer = optax.GradientTransformation | Callable[[PyTree], optax.GradientTransformation]


class Descent(NamedTuple):
    """State of `descent`.

    Args:
        params: the parameters.
        optimizer: the optax optimizer's state.
        carried: what the loss carries from step to step; () if nothing.

    >>> level = descent(lambda w, x, meta: (w - x) ** 2, optax.sgd(0.1))
    >>> level.init((jnp.ones(2),)).params
    Array([1., 1.], dtype=float32)
    """

    params: PyTree
    optimizer: PyTree
    carried: PyTree = ()


def descent(
    loss: Callable[..., PyTree],
    optimizer: Optimizer,
    *,
    start: Callable[[PyTree], PyTree] = lambda meta: meta,
    carried: Callable[[PyTree], PyTree] | None = None,
    has_aux: bool = False,
    first_order: bool = False,
    inner_gradient: Callable[..., Callable] = mixflow_grad,
    name: str = "descent",
) -> Level:
    """Gradient descent as a level, whose start, loss and optimizer a slower level can learn.

        g_t = grad_params loss(params_{t-1}, x_t, meta)        params_t = params_{t-1} + update(g_t)

    meta is the state of the next slower level (`slower[0]`). One data point of the stream is one batch.

    Args:
        loss: (params, batch, meta) -> scalar; see `carried` and `has_aux`.
        optimizer: an optax transformation, or meta -> one, for learned rates, gates or starts of a deep momentum. Its
            `update` receives optax's extra arguments `value`, `grad` and `value_fn`, or, as of `optax.contrib.sam`, those
            that it names, `grad_fn` among them.
        start: meta -> initial parameters, a tree of floats of any shapes.
        carried: meta -> initial value of what the loss carries from step to step, such as running statistics or a random
            key. The loss is then (params, batch, meta, carried) -> (scalar, carried).
        has_aux: the loss returns (what it returns otherwise, aux), aux a pytree of arrays.
        first_order: treat g_t as a constant in derivatives (first-order MAML).
        inner_gradient: called as `jax.grad` is. `mixflow_grad` takes least memory in reverse mode; `jax.grad` is also for
            forward mode and for `jax.shard_map`.
        name: of the level, in tables and errors.

    Returns:
        A `Level` of period 1 with state `Descent`. It emits the loss of every batch before its step, shape (1,), or with
        `has_aux` the pair of it and aux.

    Raises:
        UserError: the optimizer is neither, or gives its state another structure or other types at each step; when the level
            is initialised, a parameter is no float.

    Source: NL Eq. 72 (knowledge transfer by initialisation); MAML, arXiv 1703.03400.

    >>> from nested_jax import run
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
        if not isinstance(made, optax.GradientTransformation):
            raise UserError(f"{name}: the optimizer's function returns {shown(made)}: return an optax transformation")
        return optax.with_extra_args_support(made)

    def init(slower):
        params = start(slower[0])
        assert_smooth(f"{name}: parameters", params)
        memory = jax.tree.map(jnp.asarray, rule(slower).init(params))
        return Descent(params, memory, jax.tree.map(jnp.asarray, carried(slower[0])) if carried else ())

    def step(state, context, slower):
        batch = jax.tree.map(lambda x: x[0], context)
        state = vary(state, batch)

        def evaluate(params):
            """The loss, and the pair of it and all else that the loss returns."""
            out = loss(params, batch, slower[0], *([state.carried] if carried else []))
            out, aux = out if has_aux else (out, None)
            value, after = out if carried else (out, ())
            return value, (value, after, aux)

        def gradient_of(params):
            gradient, others = inner_gradient(evaluate, has_aux=True)(params)
            return jax.lax.stop_gradient(gradient) if first_order else gradient, others

        gradient, (value, after, aux) = gradient_of(state.params)
        extra = {
            "value": value,
            "grad": gradient,
            "value_fn": lambda params: evaluate(params)[0],
        }
        again = lambda params, *_: gradient_of(params)[0]
        updates, memory = _update(name, rule(slower), gradient, state, extra, again)
        moved = Descent(optax.apply_updates(state.params, updates), memory, after)
        return moved, (value[None], aux) if has_aux else value[None]

    description = Description(
        "the loss of a batch",
        "" if fixed else "an optax rule of the slower level's state",
        "batches",
        "initialisation: the slower level gives the start",
        inner=(optimizer,) if fixed else (),
    )
    return Level(init, step, 1, name, description=description, first_order=first_order)


def maml(
    inner_loss: Callable[..., PyTree],
    inner_optimizer: Optimizer,
    steps: int,
    *,
    first_order: bool = False,
    truncate: int | None = None,
    checkpoint: Checkpoint = "sqrt",
    inner_gradient: Callable[..., Callable] = mixflow_grad,
    fresh: bool = False,
    carries: bool = False,
    has_aux: bool = False,
    return_state: bool = False,
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
        inner_gradient: called as `jax.grad` is; `jax.grad` itself for forward mode and `jax.shard_map`, see `descent`.
        fresh: every step has data of its own: the task's leaves have a leading axis of T.
        carries: the loss is (params, task, carried) -> (scalar, carried), where carried is a pytree such as running
            statistics or a random key, whose initial value `adapt` receives.
        has_aux: the loss returns (what it returns otherwise, aux), aux a pytree of arrays.
        return_state: return (state, losses) instead of the parameters, or with `has_aux` (state, (losses, aux)): the final
            `Descent`, which has the optimizer's state and what is carried, and what each step returned, stacked along a
            leading axis of T.

    Returns:
        adapt(start, task, hyper=None, carried=None) -> adapted parameters, of the start's structure and shapes. It is
        differentiable with respect to start, to hyper, a pytree such as learned rates, and to carried, and can be mapped
        over tasks by `jax.vmap`. A start that is a `Descent`, such as an earlier call's state, is where adaptation goes on.

    Raises:
        UserError: steps or truncate are no whole numbers from 0, or truncate exceeds steps; the optimizer is neither, or
            changes its state's structure or types; it is a function of hyper and `adapt` receives none; `carried` is missing
            or not asked for; a parameter is no float; a `fresh` task's leading axis is not T.

    Source: Finn et al., arXiv 1703.03400; Shaban et al., arXiv 1810.10667 (truncation).

    One step towards the task, with a learned rate:

    >>> adapt = maml(lambda w, task: (w - task) ** 2 / 2, lambda hyper: optax.sgd(hyper["rate"]), steps=1)
    >>> outer = lambda start, hyper: (adapt(start, 3.0, hyper) - 3.0) ** 2 / 2
    >>> start, hyper = jax.grad(outer, argnums=(0, 1))(1.0, {"rate": 0.1})
    >>> print(start, hyper["rate"])  # -(1 - rate)^2 2, -(1 - rate) 2^2
    -1.62 -3.6

    The losses on the way of two steps, and two more from there:

    >>> adapt = maml(lambda w, task: (w - task) ** 2 / 2, optax.sgd(0.5), steps=2, return_state=True)
    >>> state, losses = adapt(0.0, 4.0)
    >>> print(losses, adapt(state, 4.0)[1])
    [8. 2.] [0.5   0.125]
    """
    last = steps if truncate is None else truncate
    if not is_whole(steps, 0) or not is_whole(last, 0) or last > steps:
        raise UserError(
            f"maml: steps={steps!r}, truncate={truncate!r}: give whole numbers, steps from 0, truncate from 0 to steps"
        )
    fixed = isinstance(inner_optimizer, optax.GradientTransformation)
    level = descent(
        lambda params, task, meta, *carried: inner_loss(params, task, *carried),
        (lambda meta: inner_optimizer(meta[1])) if callable(inner_optimizer) else inner_optimizer,
        start=lambda meta: meta[0],
        carried=(lambda meta: meta[2]) if carries else None,
        has_aux=has_aux,
        first_order=first_order,
        inner_gradient=inner_gradient,
        name="maml",
    )

    def adapt(start, task, hyper=None, carried=None):
        if not fixed and hyper is None:
            raise UserError("maml: the inner optimizer is a function of hyper: give adapt(start, task, hyper)")
        start, given = jax.tree.map(jnp.asarray, start), isinstance(start, Descent)
        if (carried is not None) != (carries and not given):
            raise UserError(
                "maml: with carries=True give adapt(start, task, hyper, carried), unless start is a Descent; otherwise not"
            )
        task = jax.tree.map(jnp.asarray, task)
        for x in jax.tree.leaves(task) if fresh else ():
            if x.shape[:1] != (steps,):
                raise UserError(f"maml: a leaf of a fresh task has shape {x.shape}: give data of {steps} steps")

        slower = ((start, hyper, carried),)
        one = lambda task: jax.tree.map(lambda x: x[None], task)

        def advance(state, begin, end, checkpoint):
            if fresh:
                step = lambda state, x: level.step(state, one(x), slower)
                xs = jax.tree.map(lambda x: x[begin:end], task)
            else:
                step, xs = (lambda state, _: level.step(state, one(task), slower)), None
            return unroll(step, state, xs, end - begin, checkpoint=checkpoint)

        state, outputs = vary(start if given else level.init(slower), task), []
        if last < steps:
            moved, emitted = jax.lax.stop_gradient(advance(state, 0, steps - last, "sqrt"))
            state = straight_through(state, moved)
            outputs.append(emitted)
        if last:
            state, emitted = advance(state, steps - last, steps, checkpoint)
            outputs.append(emitted)
        if not return_state:
            return state.params
        if not steps:
            struct = lambda x: jax.ShapeDtypeStruct(x.shape[1:] if fresh else x.shape, x.dtype)
            emit = lambda task: level.step(state, one(task), slower)[1]
            shapes = jax.eval_shape(emit, jax.tree.map(struct, task))
            outputs.append(jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), shapes))
        emitted = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
        losses, *aux = emitted if has_aux else (emitted,)
        return state, (losses[:, 0], *aux) if has_aux else losses[:, 0]

    return adapt


def _update(name: str, rule, gradient: PyTree, state: Descent, extra: dict, grad_fn: Callable) -> tuple[PyTree, PyTree]:
    """The rule's updates and its state, in the types in which it was initialised; with the extra arguments that it takes."""
    taken = inspect.signature(rule.update).parameters.values()
    if all(parameter.kind != parameter.VAR_KEYWORD for parameter in taken):
        extra = extra | {"grad_fn": grad_fn}
        extra = {parameter.name: extra[parameter.name] for parameter in taken if parameter.name in extra}
    try:
        updates, memory = rule.update(gradient, state.optimizer, state.params, **extra)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(
            f"{name}: a part of the optimizer refuses optax's extra arguments ({error}): put it first, around "
            "the others, not in optax.chain"
        ) from None
    if jax.tree.structure(memory) != jax.tree.structure(state.optimizer):
        return updates, memory  # refused, with the place, by the scan that takes the step
    keep = lambda new, old: new if jnp.result_type(new) == old.dtype else jnp.asarray(new, old.dtype)
    return updates, jax.tree.map(keep, memory, state.optimizer)


def straight_through(start: PyTree, state: PyTree) -> PyTree:
    """The values of the state with the derivatives of the start."""
    return jax.tree.map(lambda a, b: with_tangent_of(a, b) if jnp.issubdtype(b.dtype, jnp.inexact) else b, start, state)


def assert_smooth(what: str, tree: PyTree) -> None:
    """Raises UserError for the first leaf without a derivative."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(dtype := jnp.result_type(leaf), jnp.inexact):
            raise UserError(f"{what}{jax.tree_util.keystr(path)} is {dtype}: make it a float, or close over it")
