"""What a method knows of every task after each one: scores (tasks + 1, tasks), the first row before the first task."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import memories
import numpy as np
import optax
from families import Family, draw
from methods import Method
from models import Model, model

from nested_jax.typing import Array, Float, Int, PyTree

FISHER = 256  # examples that EWC measures a task with


class Kept(NamedTuple):
    """What a method keeps of the tasks before: EWC's weights and their importance; replay's examples of each task."""

    weights: PyTree
    importance: PyTree
    x: Array  # (tasks, n, inputs)
    y: Int[Array, "tasks n"]


def scores(family: Family, width: int, hidden: int, method: Method, cells: list[dict[str, Any]], tuning: bool) -> np.ndarray:
    """Scores (cells, tasks + 1, tasks) of a method at several rates, strengths and seeds, side by side.

    Args:
        family: of the tasks.
        width, hidden: of the model.
        method: one of `methods.METHODS`.
        cells: rate, strength and seed of each.
        tuning: score held-out examples, not those of the test.
    """
    judge = jnp.asarray(family.heldout if tuning else family.test)
    if method.optimizer is None:
        run = partial(memories.scores, family, method, judge)
    else:
        run = partial(_trained, family, model(family, width, hidden), method, judge)
    return np.asarray(
        jax.jit(jax.vmap(run))(*(jnp.array([cell[key] for cell in cells]) for key in ("seed", "rate", "strength")))
    )


def _trained(
    family: Family, model: Model, method: Method, judge: Array, seed: Array, rate: Array, strength: Array
) -> Float[Array, "N tasks"]:
    assert method.optimizer is not None
    key, order, start = jax.random.split(jax.random.key(seed), 3)
    rule, train, batch = method.optimizer(family.rates * rate), jnp.asarray(family.train), family.batch_size
    n = family.classes * train.shape[1]
    own = min(n, max(1, method.stored // family.tasks))

    def judged(params: PyTree) -> Float[Array, " tasks"]:
        return jax.lax.map(lambda task: model.score(params, *draw(family, key, task, judge)), jnp.arange(family.tasks))

    def loss(params: PyTree, kept: Kept, x: Array, y: Array, task: Array, key: Array) -> Array:
        value = model.nats(params, x, y).mean()
        if method.kind == "ewc":
            far = jax.tree.map(lambda w, old, weight: (weight * (w - old) ** 2).sum(), params, kept.weights, kept.importance)
            value += strength / 2 * sum(jax.tree.leaves(far))
        if method.kind == "replay":
            which = jax.random.randint(key, (2, batch), 0, jnp.stack([jnp.maximum(task, 1), jnp.asarray(own)])[:, None])
            value += jnp.where(task > 0, model.nats(params, kept.x[*which], kept.y[*which]).mean(), 0)
        return value

    def one_task(carry: tuple[PyTree, PyTree, Kept], task: Array) -> tuple[tuple[PyTree, PyTree, Kept], Array]:
        params, state, kept = carry
        x, y = draw(family, key, task, train)

        def update(carry: tuple[PyTree, PyTree], given: tuple[Array, Array]) -> tuple[tuple[PyTree, PyTree], None]:
            (params, state), (rows, key) = carry, given
            gradient = jax.grad(loss)(params, kept, x[rows], y[rows], task, key)
            updates, state = rule.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        first, *epochs = jax.random.split(jax.random.fold_in(order, task), family.epochs + 1)
        rows = jnp.concatenate([jax.random.permutation(own, n)[: n - n % batch].reshape(-1, batch) for own in epochs])
        (params, state), _ = jax.lax.scan(update, (params, state), (rows, jax.random.split(first, len(rows))))
        kept = _keep(model, method, params, kept, x, y, task, jax.random.permutation(first, n), own)
        return (params, state, kept), judged(params)

    params, stored = model.init(start), (family.tasks, own)
    kept = Kept(
        params,
        jax.tree.map(jnp.zeros_like, params),
        jnp.zeros((*stored, train.shape[-1]), train.dtype),
        jnp.zeros(stored, int),
    )
    _, rows = jax.lax.scan(one_task, (params, rule.init(params), kept), jnp.arange(family.tasks))
    return jnp.concatenate([judged(params)[None], rows])


def _keep(
    model: Model,
    method: Method,
    params: PyTree,
    kept: Kept,
    x: Array,
    y: Array,
    task: Array,
    rows: Int[Array, " n"],
    own: int,
) -> Kept:
    """What is kept after a task: with EWC the diagonal of Fisher's information, summed over tasks; with replay examples."""
    if method.kind == "replay":
        return kept._replace(x=kept.x.at[task].set(x[rows[:own]]), y=kept.y.at[task].set(y[rows[:own]]))
    if method.kind != "ewc":
        return kept

    def square(total: PyTree, row: Array) -> tuple[PyTree, None]:
        gradient = jax.grad(lambda params: model.nats(params, x[row][None], y[row][None])[0])(params)
        return jax.tree.map(lambda a, g: a + g**2 / FISHER, total, gradient), None

    importance, _ = jax.lax.scan(square, kept.importance, rows[:FISHER])
    return kept._replace(weights=params, importance=importance)
