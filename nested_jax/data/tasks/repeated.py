"""Repetitions of one string, such as (aa)* and (abab)*: which symbols may follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from nested_jax.checks import Named, check_fields
from nested_jax.data.pipeline import Batch
from nested_jax.data.tasks.task import draw_lengths, to_batch


@dataclass(frozen=True)
class Repeated:
    """Words that repeat a string, w w ... w; the label of a slot is the set of symbols that may follow the word's part up to
    and with it.

    The letters of the string are the tokens, in the order in which they appear. The set after a whole number of repetitions
    is {first letter, end}, label 0; any other one has the next letter alone, labels 1, 2, ... in the letters' order.
    So (aa)* has the labels {a, end}, {a}, and (abab)* has {a, end}, {a}, {b}.

    Source: Bhattamishra et al. 2020 (On the ability and limitations of Transformers to recognize formal languages).

    >>> batch = Repeated("abab").sample(np.random.default_rng(0), 1, 8, 8)
    >>> batch.tokens, batch.targets
    (array([[0, 1, 0, 1, 0, 1, 0, 1]], dtype=int32), array([[2, 1, 2, 0, 2, 1, 2, 0]], dtype=int32))
    """

    string: Annotated[str, Named("the string to repeat")] = "aa"
    """What words repeat."""

    def __post_init__(self):
        check_fields(self, "Repeated: ")

    @property
    def tokens(self) -> int:
        """Number of different letters."""
        return len(set(self.string))

    @property
    def labels(self) -> int:
        """One for each letter that follows within the string, and one for its end."""
        return 1 + len(set(self.string[1:]))

    def sample(self, rng: np.random.Generator, batch_size: int, shortest: int, longest: int) -> Batch:
        """Words whose lengths are multiples of the string's, see `Task.sample`."""
        period = len(self.string)
        lengths = draw_lengths(rng, f"({self.string})*", batch_size, shortest, longest, multiple=period)
        letters = {letter: i for i, letter in enumerate(dict.fromkeys(self.string))}
        following = {letter: i for i, letter in enumerate(sorted(set(self.string[1:]), key=letters.__getitem__), 1)}
        place = np.arange(longest) % period
        tokens = np.array([letters[letter] for letter in self.string])[place]
        labels = np.array([*(following[letter] for letter in self.string[1:]), 0])[place]
        everywhere = np.ones((batch_size, longest), int)
        return to_batch(tokens * everywhere, labels * everywhere, np.ones(longest, bool), lengths)
