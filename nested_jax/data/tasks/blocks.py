"""Blocks of equal length, such as a^n b^n and a^n b^n c^n: which symbols may follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from nested_jax.checks import Interval, check_fields
from nested_jax.data.pipeline import Batch
from nested_jax.data.tasks.task import draw_lengths, to_batch


@dataclass(frozen=True)
class EqualBlocks:
    """Words of n times the first letter, n times the second, and so on; the label of a slot is the set of symbols that may
    follow the word's part up to and with it.

    Token k is letter k. Label 0 is {first letter, second letter}, label k >= 1 is {letter k} alone, and the last one is
    {end}: of a^n b^n {a, b}, {b}, {end}, and of a^n b^n c^n {a, b}, {b}, {c}, {end}.

    Source: Bhattamishra et al. 2020 (On the ability and limitations of Transformers to recognize formal languages).

    >>> batch = EqualBlocks(3).sample(np.random.default_rng(0), 1, 6, 6)
    >>> batch.tokens, batch.targets
    (array([[0, 0, 1, 1, 2, 2]], dtype=int32), array([[0, 0, 1, 2, 2, 3]], dtype=int32))
    """

    letters: Annotated[int, Interval(least=2)] = 2
    """Number of blocks, each of a letter of its own."""

    def __post_init__(self):
        check_fields(self, "EqualBlocks: ")

    @property
    def tokens(self) -> int:
        """Number of letters."""
        return self.letters

    @property
    def labels(self) -> int:
        """One more than letters."""
        return self.letters + 1

    def sample(self, rng: np.random.Generator, batch_size: int, shortest: int, longest: int) -> Batch:
        """Words whose lengths are multiples of the number of letters, see `Task.sample`."""
        thing = " ".join(f"{letter}^n" for letter in "abcdefghijklmnopqrstuvwxyz"[: self.letters])
        lengths = draw_lengths(rng, thing, batch_size, shortest, longest, multiple=self.letters)
        block, place = np.divmod(np.arange(longest), lengths[:, None] // self.letters)
        last = place == lengths[:, None] // self.letters - 1
        labels = np.where(block == 0, 0, block + last)
        return to_batch(block, labels, np.ones(longest, bool), lengths)
