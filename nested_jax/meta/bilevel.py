"""Gradient descent as a level, whose start, loss and optimizer a slower level learns: MAML."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.description import Description
from nested_jax.errors import UserError, is_whole
from nested_jax.level import Level
from nested_jax.meta.mixflow import mixflow_grad
from nested_jax.meta.unrolling import unroll
from nested_jax.remat import Checkpoint
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
        return optax.with_extra_args_support(made)

    def init(slower):
        params = start(slower[0])
        assert_smooth(f"{name}: parameters", params)
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
            state = straight_through(state, jax.lax.stop_gradient(advance(state, steps - last, "sqrt")))
        return advance(state, last, checkpoint).params

    return adapt


def straight_through(start: PyTree, state: PyTree) -> PyTree:
    """The values of the state with the derivatives of the start."""
    return jax.tree.map(lambda a, b: _with_derivative_of(a, b) if jnp.issubdtype(b.dtype, jnp.inexact) else b, start, state)


@jax.custom_jvp
def _with_derivative_of(a: Array, b: Array) -> Array:
    """b with the derivative of a, without arithmetic: b may be infinite."""
    return b


_with_derivative_of.defjvp(lambda primals, tangents: (primals[1], tangents[0]))


def assert_smooth(what: str, tree: PyTree) -> None:
    """Raises UserError for the first leaf without a derivative."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(dtype := jnp.result_type(leaf), jnp.inexact):
            raise UserError(f"{what}{jax.tree_util.keystr(path)} is {dtype}: make it a float, or close over it")
