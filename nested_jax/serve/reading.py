"""What a learner finds in a text, token by token, and what it writes into its levels, part by part."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.cms.in_context import fast_weights
from nested_jax.errors import UserError
from nested_jax.models.config import ModelConfig
from nested_jax.models.language_model import ModelState
from nested_jax.numerics import nats
from nested_jax.serve.pool import Pool, grid_of, next_piece
from nested_jax.typing import Array, Float, Int, PyTree

LIKELIEST = 3
"""Tokens of which a reading has the chances."""
MEMORIES = "sequence layers"
"""Name of the level of all memories of sequence layers."""


class Reading(NamedTuple):
    """A table of the tokens of a text, and one of the parts that it was read in, of a segment of the CMS at most.

    tokens: read; nats: -log p of each before it was read, NaN where nothing predicts it, a document's first; likeliest,
    chances: the likeliest tokens there, and their probabilities.
    ends: tokens that the learner has read after each part; levels: names; written: the norm of what a part changes in the
    weights of each level; held: the norm of the difference between them and their start.
    """

    tokens: Int[np.ndarray, " T"]
    nats: Float[np.ndarray, " T"]
    likeliest: Int[np.ndarray, "T 3"]
    chances: Float[np.ndarray, "T 3"]
    ends: Int[np.ndarray, " S"]
    levels: tuple[str, ...]
    written: Float[np.ndarray, "S N"]
    held: Float[np.ndarray, "S N"]


def read(pool: Pool, row: int, text: Int[np.ndarray, " T"], learn: bool) -> Reading:
    """Lets a learner read a text, and watches.

    Args:
        pool: of the learner.
        row: of the learner.
        text: tokens.
        learn: as of `Pool.read`.

    Returns:
        A `Reading`.
    """
    config, start, parts, ends, at = pool.config, pool.start()[0], [], [], 0
    while at < len(text):
        before, logits = pool.get(row)
        known = pool.read_so_far[row] > 0
        most = grid_of(config) if grid_of(config) > 1 else 64
        size = next_piece(config, pool.read_so_far[row], min(len(text) - at, most)).tokens
        part = text[at : at + size]
        ((_, following),) = pool.read({row: part}, learn)
        logits = jnp.concatenate([logits[None], following[:-1]])
        parts.append(_look(config, start, before, pool.get(row)[0], logits, part, known))
        ends.append(pool.read_so_far[row])
        at += size
    if not len(text):
        raise UserError("read: the text is empty: give a token or more")
    surprise, likeliest, chances, written, held = map(np.concatenate, zip(*parts, strict=True))
    return Reading(text, surprise, likeliest, chances, np.asarray(ends), levels_of(config, start), written, held)


def levels_of(config: ModelConfig, state: ModelState) -> tuple[str, ...]:
    """Names of the levels that a reading shows: the memories of sequence layers, and the CMS's that learn, slow to fast."""
    return (*[MEMORIES] * bool(_weights(state)[0]), *(f"CMS {name}" for name in cms_levels(config)))


def cms_levels(config: ModelConfig) -> tuple[str, ...]:
    """Names of the CMS's levels that learn, slow to fast."""
    return tuple(f"level{config.cms.frozen + i + 1}" for i in range(len(config.cms.periods) if config.adapting else 0))


def _weights(state: ModelState) -> list[PyTree]:
    """The weights of each level, that of memories first, empty for attention."""
    leaves = jax.tree_util.tree_leaves_with_path(state.mixers)
    memories = [leaf for path, leaf in leaves if jax.tree_util.keystr(path[-1:], simple=True) == "weights"]
    learning = [] if state.learning is None else [level.matrices for level in fast_weights(state.learning.levels)]
    return [memories, *learning]


@partial(jax.jit, static_argnums=0)
def _look(
    config: ModelConfig,
    start: ModelState,
    before: ModelState,
    after: ModelState,
    logits: Float[Array, "t V"],
    tokens: Int[Array, " t"],
    known: bool,
) -> tuple[Array, Array, Array, Array, Array]:
    surprise = nats(logits, tokens)
    surprise = surprise.at[0].set(jnp.where(known, surprise[0], jnp.nan))
    chances, likeliest = jax.lax.top_k(jax.nn.softmax(logits), LIKELIEST)

    written, held = difference(before, after), difference(start, after)
    return surprise, likeliest, chances, written[None], held[None]


@jax.jit
def difference(old: ModelState, new: ModelState) -> Float[Array, " N"]:
    """Norms of what differs between two states of a model, for each of `levels_of`."""
    levels = [pair for pair in zip(_weights(old), _weights(new), strict=True) if jax.tree.leaves(pair)]
    square = lambda a, b: jnp.square(b - a).sum()
    found = [jnp.sqrt(sum(jax.tree.leaves(jax.tree.map(square, *pair)))) for pair in levels]
    return jnp.stack(found) if found else jnp.zeros(0)
