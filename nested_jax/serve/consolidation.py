"""Sleep: what fast levels of a learner's CMS hold is distilled into a slower one, from text that the learner itself writes.

min over the slow level of  KL(p_before || p_after),  the faster levels back at their starts
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.cms.in_context import fast_weights, with_level
from nested_jax.models.config import ModelConfig
from nested_jax.models.language_model import ModelState, apply, init_state
from nested_jax.typing import Array, Float, Int, PyTree

BATCH = 8
"""Texts of an update."""


class Consolidation(NamedTuple):
    """How far the learner after is from the one before on the texts: mean KL divergences, nats a token.

    forgotten: if the fast levels were only set back; distilled: as they were distilled before that.
    """

    forgotten: float
    distilled: float


def still(config: ModelConfig, weights: PyTree, levels: Sequence[PyTree]) -> tuple[ModelConfig, PyTree]:
    """A model that does not learn in context, whose CMS has the matrices of levels that did, of one learner.

    Args:
        config, weights: as of `init_state`, of a model that learns in context.
        levels: matrices of the levels that learn, slow to fast, as of `FastWeights`.
    """
    cms = config.cms
    blocks = dict(weights["blocks"]["cms"])
    for i in range(len(cms.hidden)):
        level = blocks[f"level{i + 1}"]
        if i < cms.frozen:
            continue
        own = levels[i - cms.frozen]
        own = jax.tree.map(lambda w: w[:, 0], own) if cms.scope == "sequence" else own
        start = level if "up" in level else blocks["level1"]  # a nested level starts as the slower one is
        put = {name: start[name].astype(w.dtype).at[-config.adapting :].set(w) for name, w in own.items()}
        blocks[f"level{i + 1}"] = {name: w for name, w in level.items() if name not in ("rate", *put)} | put
    model = dataclasses.replace(config, cms=dataclasses.replace(cms, periods=(), blocks=None))
    return model, weights | {"blocks": weights["blocks"] | {"cms": blocks}}


def matrices_of(state: ModelState) -> list[PyTree]:
    """Matrices of the levels that learn, slow to fast."""
    assert state.learning is not None
    return [level.matrices for level in fast_weights(state.learning.levels)]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def write(
    config: ModelConfig, texts: int, tokens: int, first: int | None, weights: PyTree, levels: Sequence[PyTree], seed: Array
) -> Int[Array, "R T"]:
    """Texts that a learner writes from the start of a document, the token `first`; None: any token."""
    model, weights = still(config, weights, levels)
    key, own = jax.random.split(jax.random.key(seed))
    start = jax.random.randint(own, (texts,), 0, config.vocabulary) if first is None else jnp.full(texts, first)
    state = jax.tree.map(jnp.asarray, init_state(model, weights, texts, max_length=tokens))

    def one(carry: tuple[ModelState, Array], key: Array) -> tuple[tuple[ModelState, Array], Array]:
        state, token = carry
        logits, state = apply(model, weights, token[:, None], state)
        return (state, jax.random.categorical(key, logits[:, -1])), token

    return jax.lax.scan(one, (state, start), jax.random.split(key, tokens))[1].T


@partial(jax.jit, static_argnums=(0, 1, 2))
def distil(
    config: ModelConfig,
    index: int,
    steps: int,
    weights: PyTree,
    state: ModelState,
    start: ModelState,
    texts: Int[Array, "R T"],
    rate: Float[Array, ""],
    seed: Array,
) -> tuple[ModelState, tuple[Float[Array, ""], Float[Array, ""]]]:
    """The state with the level of this index distilled from it and all faster ones, and those back at their starts.

    Args:
        config, weights: as of `init_state`.
        index: of the level among those that learn, slow to fast.
        steps: of Adam.
        state, start: of the learner now, and of one that has read nothing.
        texts: to be predicted alike.
        rate: of Adam.
        seed: of the choice of texts for each step.

    Returns:
        (state, divergences as of `Consolidation`).
    """
    now, fresh = matrices_of(state), matrices_of(start)
    nested = config.cms.variant == "nested"

    def logits(levels: Sequence[PyTree], rows: Int[Array, "b T"]) -> Float[Array, "b T V"]:
        model, own = still(config, weights, levels)
        b, T = rows.shape
        return apply(model, own, rows, init_state(model, own, b, max_length=T), multiple=T)[0]

    def after(matrices: PyTree) -> list[PyTree]:
        return [*now[:index], matrices, *([matrices] * len(now[index + 1 :]) if nested else fresh[index + 1 :])]

    def divergence(matrices: PyTree, rows: Int[Array, "b T"]) -> Float[Array, ""]:
        wanted, found = (jax.nn.log_softmax(logits(levels, rows)) for levels in (now, after(matrices)))
        return (jnp.exp(wanted) * (wanted - found)).sum(-1).mean()

    def step(carry: tuple[PyTree, PyTree], key: Array) -> tuple[tuple[PyTree, PyTree], None]:
        matrices, memory = carry
        rows = texts[jax.random.randint(key, (min(BATCH, len(texts)),), 0, len(texts))]
        updates, memory = rule.update(jax.grad(divergence)(matrices, rows), memory)
        return (optax.apply_updates(matrices, updates), memory), None

    def mean(matrices: PyTree) -> Float[Array, ""]:
        return jax.lax.map(lambda row: divergence(matrices, row[None]), texts).mean()

    rule = optax.adam(rate)
    keys = jax.random.split(jax.random.key(seed), steps)
    (matrices, _), _ = jax.lax.scan(step, (now[index], rule.init(now[index])), keys)
    assert state.learning is not None and start.learning is not None
    levels, starts, elapsed = state.learning.levels, fast_weights(start.learning.levels), fast_weights(state.learning.levels)
    for i, own in enumerate(after(matrices)):
        if i >= index:  # gradients and memories of the rule are of weights that are no more
            levels = with_level(levels, i, starts[i]._replace(matrices=own, elapsed=elapsed[i].elapsed))
    return state._replace(learning=state.learning._replace(levels=levels)), (mean(now[index]), mean(matrices))
