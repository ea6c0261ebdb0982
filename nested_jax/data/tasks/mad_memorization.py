"""Memorization of MAD: values of keys by a map that is the same in all sequences, so that weights have to hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from nested_jax.checks import Count, Interval, check_fields
from nested_jax.data.pipeline import Batch
from nested_jax.data.tasks.task import draw_lengths, to_batch


@dataclass(frozen=True)
class Memorization:
    """Random keys, each followed by the token that asks; the label of that token's slot is the key's value.

    Tokens are the keys, then as many values, then the one that asks. Values are no input: the map, a permutation drawn once
    from `seed`, can only be learned from the labels.

    Source: Poli et al. 2024 (Mechanistic design and scaling of hybrid architectures), memorization.

    >>> batch = Memorization(keys=3).sample(np.random.default_rng(0), 1, 6, 6)
    >>> batch.tokens, batch.targets
    (array([[2, 6, 1, 6, 1, 6]], dtype=int32), array([[0, 4, 0, 5, 0, 5]], dtype=int32))
    """

    keys: Count = 127
    """Number of keys, and of values."""
    seed: Annotated[int, Interval(least=0)] = 12345
    """Of the map."""

    def __post_init__(self):
        check_fields(self, "Memorization: ")

    @property
    def tokens(self) -> int:
        """Keys, values and the token that asks."""
        return 2 * self.keys + 1

    @property
    def labels(self) -> int:
        """Labels are values, numbered as tokens."""
        return 2 * self.keys

    @property
    def values(self) -> np.ndarray:
        """(keys,): the value of each key."""
        return self.keys + np.random.default_rng(self.seed).permutation(self.keys)

    def sample(self, rng: np.random.Generator, batch_size: int, shortest: int, longest: int) -> Batch:
        """Sequences of even lengths, see `Task.sample`."""
        lengths = draw_lengths(rng, "memorization", batch_size, shortest, longest, multiple=2)
        keys = rng.integers(self.keys, size=(batch_size, (longest + 1) // 2)).repeat(2, axis=1)[:, :longest]
        asks = np.arange(longest) % 2 == 1
        return to_batch(np.where(asks, 2 * self.keys, keys), self.values[keys], asks, lengths)
