"""Memories that read each example once, with its class: attention keeps all, other rules a matrix or two."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from families import Family, draw
from methods import Method

from nested_jax.memory.recurrence import Gates, MemoryState, chunked
from nested_jax.typing import Array, Float, Int

FEATURES, CHUNK = 512, 32  # of a key; examples of a chunk

Features = Callable[[Array], Array]


def scores(
    family: Family, method: Method, judge: Array, seed: Array, rate: Array, strength: Array
) -> Float[Array, "N tasks"]:
    """Accuracies before the first task and after each one; keys are random features of an example, of unit norm.

    Args:
        family: of the tasks.
        method: of kind "attention", "delta" or "squares".
        judge: examples to score, by class.
        seed, rate, strength: of the run.
    """
    key, order, start = jax.random.split(jax.random.key(seed), 3)
    train, inputs = jnp.asarray(family.train), family.train.shape[-1]
    project = jax.random.normal(start, (inputs, FEATURES)) * inputs**-0.5

    def examples(task: Array, part: Array) -> tuple[Float[Array, "N K"], Int[Array, " N"]]:
        x, y = draw(family, key, task, part)
        features = jax.nn.gelu(x @ project)
        return features / jnp.linalg.norm(features, axis=-1, keepdims=True), y

    read, judged = (lambda task: examples(task, train)), (lambda task: examples(task, judge))
    if method.kind == "attention":
        return _attention(family, read, judged, strength)
    return (
        _squares(family, read, judged, strength) if method.kind == "squares" else _delta(family, read, judged, order, rate)
    )


def _attention(family: Family, train: Features, judge: Features, strength: Array) -> Float[Array, "N tasks"]:
    """The class with the most weight, softmax(strength k q), among the examples that have been read."""

    def judged(task: Array) -> Float[Array, " N"]:
        queries, classes = judge(task)

        def weight(_, other: Array) -> tuple[None, Float[Array, "queries classes"]]:
            keys, y = train(other)
            values = jax.nn.one_hot(y, family.total)
            return None, jnp.exp(strength * (queries @ keys.T - 1)) @ values  # of unit vectors: never overflows

        _, weights = jax.lax.scan(weight, None, jnp.arange(family.tasks))
        read = jnp.concatenate([jnp.zeros_like(weights[:1]), weights.cumsum(0)])
        return (read.argmax(-1) == classes[None]).mean(-1)

    return jax.lax.map(judged, jnp.arange(family.tasks)).T


def _linear(family: Family, judge: Features, weights: Float[Array, "V K"]) -> Float[Array, " tasks"]:
    """Accuracies of the class with the largest W k."""

    def of(task: Array) -> Array:
        queries, classes = judge(task)
        return ((queries @ weights.T).argmax(-1) == classes).mean()

    return jax.lax.map(of, jnp.arange(family.tasks))


def _squares(family: Family, train: Features, judge: Features, strength: Array) -> Float[Array, "N tasks"]:
    """W = argmin sum |W k - v|^2 + strength |W|^2 over all that was read, from sums of v k^T and k k^T: Omega's rule (NL
    Eq. 68) with a window of everything, solved."""

    def read(sums: tuple[Array, Array], task: Array) -> tuple[tuple[Array, Array], Float[Array, " tasks"]]:
        keys, y = train(task)
        both, own = sums[0] + jax.nn.one_hot(y, family.total).T @ keys, sums[1] + keys.T @ keys
        solved = jax.scipy.linalg.solve(own + strength * jnp.eye(FEATURES), both.T, assume_a="pos").T
        return (both, own), _linear(family, judge, solved)

    start = jnp.zeros((family.total, FEATURES))
    _, rows = jax.lax.scan(read, (start, jnp.zeros((FEATURES, FEATURES))), jnp.arange(family.tasks))
    return jnp.concatenate([_linear(family, judge, start)[None], rows])


def _delta(family: Family, train: Features, judge: Features, order: Array, rate: Array) -> Float[Array, "N tasks"]:
    """W <- W - rate (W k - v) k^T, v the class: NL Eq. 65, in chunks with exact errors."""

    def read(weights: Array, task: Array) -> tuple[Array, Float[Array, " tasks"]]:
        keys, y = train(task)
        rows = jax.random.permutation(jax.random.fold_in(order, task), len(y))[: len(y) - len(y) % CHUNK].reshape(-1, CHUNK)
        ones = jnp.ones(CHUNK)

        def chunk(weights: Array, rows: Array) -> tuple[Array, None]:
            gates, values = Gates(rate * ones, 0 * ones, ones), jax.nn.one_hot(y[rows], family.total)
            return chunked(MemoryState(weights), keys[rows], -values, gates, None, exact=True)[0].weights, None

        weights, _ = jax.lax.scan(chunk, weights, rows)
        return weights, _linear(family, judge, weights)

    start = jnp.zeros((family.total, FEATURES))
    _, rows = jax.lax.scan(read, start, jnp.arange(family.tasks))
    return jnp.concatenate([_linear(family, judge, start)[None], rows])
