"""Parity: whether the ones read so far are odd in number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nested_jax.data.pipeline import Batch
from nested_jax.data.tasks.task import draw_lengths, to_batch


@dataclass(frozen=True)
class Parity:
    """Words of zeros and ones; the label of a slot is the sum, modulo 2, of the tokens up to and with it.

    Source: Bhattamishra et al. 2020 (On the ability and limitations of Transformers to recognize formal languages).

    >>> batch = Parity().sample(np.random.default_rng(1), 1, 6, 6)
    >>> batch.tokens, batch.targets
    (array([[0, 1, 1, 1, 0, 0]], dtype=int32), array([[0, 1, 0, 1, 1, 1]], dtype=int32))
    """

    @property
    def tokens(self) -> int:
        """Zero and one."""
        return 2

    @property
    def labels(self) -> int:
        """Even and odd."""
        return 2

    def sample(self, rng: np.random.Generator, batch_size: int, shortest: int, longest: int) -> Batch:
        """Words of any length, see `Task.sample`."""
        lengths = draw_lengths(rng, "parity", batch_size, shortest, longest)
        tokens = rng.integers(2, size=(batch_size, longest))
        return to_batch(tokens, tokens.cumsum(axis=1) % 2, np.ones(longest, bool), lengths)
