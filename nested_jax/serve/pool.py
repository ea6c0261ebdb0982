"""Fast states of many learners of one model, side by side on one device, each at a position of its own.

A piece of text is cut where the model's grids are: whole segments of its CMS and chunks of its memories, else parts of one
segment, in a few sizes. So few programs read pieces of any length, and none of them has to find out at run time whether a
segment closes: under `jax.vmap` both branches would be computed.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.models.config import ModelConfig
from nested_jax.models.language_model import ModelState, Rules, apply, init_state
from nested_jax.numerics import upcast
from nested_jax.serve.file import fingerprint
from nested_jax.typing import Array, Bool, Float, Int, PyTree

LONGEST = 4096
"""Tokens of a piece at most, or the grid's if those are more."""


class Piece(NamedTuple):
    """What one program reads: so many tokens, from a multiple of a number, and whether the first one closes a segment."""

    tokens: int
    multiple: int
    closes: bool


def next_piece(config: ModelConfig, read: int, left: int) -> Piece:
    """The next piece of a text of which so many tokens are left, after so many have been read.

    >>> from nested_jax import preset
    >>> config = preset("tiny-hope")
    >>> config.reading, config.cms.periods
    (64, (256, 64))
    >>> next_piece(config, 0, 1000), next_piece(config, 576, 60)
    (Piece(tokens=512, multiple=64, closes=False), Piece(tokens=8, multiple=1, closes=True))
    """
    segment, grid = config.cms.periods[-1] if config.adapting else config.reading, grid_of(config)
    closes = bool(config.adapting and read and not read % segment)
    if read % grid == 0 and left >= grid:
        return Piece(grid * _power_of_8(min(left, max(LONGEST, grid)) // grid), grid, closes)
    return Piece(_power_of_8(min(left, segment - read % segment)), 1, closes)


def grid_of(config: ModelConfig) -> int:
    """Pieces that start on a multiple of so many tokens are read in the fastest way."""
    return math.lcm(config.cms.periods[-1] if config.adapting else config.reading, config.reading)


def _power_of_8(most: int) -> int:
    return 8 ** ((most.bit_length() - 1) // 3)


class Pool:
    """States of learners 0 to number - 1.

    Args:
        config, weights, rules: as of `init_state`.
        number: of learners.
        max_length: tokens that attention sees; other layers have no such bound.
    """

    def __init__(self, config: ModelConfig, weights: PyTree, rules: Rules | None, number: int, max_length: int):
        self.config, self.weights, self.rules, self.max_length = config, weights, rules, max_length
        self.read_so_far = [0] * number
        self._spare = number  # a row that what fills a call up is written to
        spread = lambda leaf: jnp.tile(leaf, (number + 1, *(1 for _ in leaf.shape)))
        self.states, self.logits = jax.tree.map(spread, self.start())

    @cached_property
    def fingerprint(self) -> str:
        """Of the model."""
        return fingerprint(self.config, self.weights)

    def start(self) -> tuple[ModelState, Float[Array, " V"]]:
        """What a learner has that has read nothing."""
        return _start(self.config, self.rules, self.max_length, self.weights)

    def get(self, row: int) -> tuple[ModelState, Float[Array, " V"]]:
        """A learner's state, and its logits of the next token."""
        return jax.tree.map(lambda leaf: leaf[row], (self.states, self.logits))

    def put(self, row: int, own: tuple[ModelState, Float[Array, " V"]], read: int) -> None:
        """Gives a learner what one has that has read so many tokens."""
        self.states, self.logits = _put((self.states, self.logits), row, own)
        self.read_so_far[row] = read

    def read(self, texts: Mapping[int, Int[np.ndarray, " T"]], learn: bool) -> Iterator[tuple[int, Array]]:
        """Lets learners read texts, those together that are at the same place of the model's grids.

        Args:
            texts: tokens, by learner.
            learn: whether the CMS learns to predict them.

        Yields:
            (learner, logits (t, V)) of pieces, for each learner in order.
        """
        left = {row: np.asarray(text, np.int32) for row, text in texts.items() if len(text)}
        while left:
            alike = collections.defaultdict(list)
            for row, text in left.items():
                alike[next_piece(self.config, self.read_so_far[row], len(text))].append(row)
            piece, rows = max(alike.items(), key=lambda each: (len(each[1]), -each[0].tokens))
            full = 4 ** -(-(len(rows) - 1).bit_length() // 2)  # learners of a call: 1, 4, 16, ...
            at = np.asarray([*rows, *[self._spare] * (full - len(rows))])
            tokens = np.stack([left[row][: piece.tokens] for row in [*rows, *rows[:1] * (full - len(rows))]])
            own = _take(self.states, at)
            logits, own = _read(self.config, self.rules, self.weights, *piece[1:], own, tokens, np.asarray(learn))
            self.states, self.logits = _put((self.states, self.logits), at, (own, logits[:, -1]))
            for i, row in enumerate(rows):
                self.read_so_far[row] += piece.tokens
                left[row] = left[row][piece.tokens :]
                if not len(left[row]):
                    del left[row]
                yield row, logits[i]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _start(config: ModelConfig, rules: Rules | None, max_length: int, weights: PyTree) -> tuple[ModelState, Array]:
    state = init_state(config, weights, 1, max_length=max_length, rules=rules)
    return jax.tree.map(jnp.asarray, state), jnp.zeros(config.vocabulary, upcast(weights["norm"]).dtype)


@jax.jit
def _take(states: ModelState, rows: Int[Array, " n"]) -> ModelState:
    return jax.tree.map(lambda leaf: leaf[rows], states)


@partial(jax.jit, donate_argnums=0)
def _put(pool: PyTree, rows: Int[Array, "*n"], own: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, new: leaf.at[rows].set(new), pool, own)


@partial(jax.jit, static_argnums=(0, 1, 3, 4), donate_argnums=5)
def _read(
    config: ModelConfig,
    rules: Rules | None,
    weights: PyTree,
    multiple: int,
    closes: bool,
    states: ModelState,
    tokens: Int[Array, "n t"],
    learn: Bool[Array, ""],
) -> tuple[Float[Array, "n t V"], ModelState]:
    """Logits of a piece, and the states after it."""

    def one(state: ModelState, tokens: Int[Array, " t"]) -> tuple[Array, ModelState]:
        learned = jnp.broadcast_to(learn, (1, tokens.size)) if config.adapting else None
        logits, state = apply(
            config, weights, tokens[None], state, multiple=multiple, closes=closes, learn=learned, rules=rules
        )
        return logits[0], state

    return jax.vmap(one)(states, tokens)
