"""Multi-query associative recall: key-value pairs, then each key once more, as a query for its value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nested_jax.checks import Count, Positive, check_fields
from nested_jax.data.pipeline import Batch
from nested_jax.data.tasks.task import draw_distinct, draw_lengths, to_batch
from nested_jax.errors import UserError


@dataclass(frozen=True)
class MQAR:
    """Pairs k_1 v_1 ... k_D v_D, then each key at a random place among random values; the label of such a query's slot is
    the value of its key. No other slot has a label.

    Keys are different tokens below V / 2, values different ones from V / 2 on, both drawn anew for each sequence. Queries
    stand at even distances 2 g from the end of the pairs, the D different g drawn in turn with p(g) ~ (g + 1)^(a - 1). The
    slots between them hold random values, so that a key after the pairs is a query. (In zoology they hold any token.)

    Source: Arora et al. 2023 (Zoology: measuring and improving recall in efficient language models).

    >>> batch = MQAR(pairs=2, vocabulary=8).sample(np.random.default_rng(0), 1, 12, 12)
    >>> batch.tokens, batch.targets
    (array([[3, 6, 2, 7, 2, 7, 3, 4, 5, 7, 6, 4]], dtype=int32), array([[0, 0, 0, 0, 7, 0, 6, 0, 0, 0, 0, 0]], dtype=int32))
    """

    pairs: Count = 8
    """Number D of key-value pairs."""
    vocabulary: Count = 64
    """Number V of tokens, the first half of them keys."""
    power: Positive = 0.01
    """Exponent a of the distances; 1: all are equally likely."""

    def __post_init__(self):
        check_fields(self, "MQAR: ")
        if self.vocabulary < 2 * self.pairs:
            raise UserError(f"MQAR: vocabulary {self.vocabulary} for {self.pairs} pairs: give {2 * self.pairs} or more")

    @property
    def tokens(self) -> int:
        """The vocabulary."""
        return self.vocabulary

    @property
    def labels(self) -> int:
        """The vocabulary: labels are values, the tokens of its second half."""
        return self.vocabulary

    def sample(self, rng: np.random.Generator, batch_size: int, shortest: int, longest: int) -> Batch:
        """Sequences of at least 4 D tokens, see `Task.sample`."""
        D, half = self.pairs, self.vocabulary // 2
        lengths = draw_lengths(rng, f"mqar with {D} pairs", batch_size, shortest, longest, least=4 * D)
        keys = draw_distinct(rng, batch_size, half, D)
        values = half + draw_distinct(rng, batch_size, self.vocabulary - half, D)
        tokens = rng.integers(half, self.vocabulary, size=(batch_size, longest))
        tokens[:, 0 : 2 * D : 2], tokens[:, 1 : 2 * D : 2] = keys, values
        distances = np.arange((longest - 2 * D + 1) // 2)
        ranks = (self.power - 1) * np.log1p(distances) + rng.gumbel(size=(batch_size, len(distances)))
        ranks[2 * (D + distances) >= lengths[:, None]] = -np.inf
        slots = 2 * (D + np.argsort(-ranks, axis=1)[:, :D])  # the D largest: drawn in turn without replacement
        labels, labelled = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        np.put_along_axis(tokens, slots, keys, axis=1)
        np.put_along_axis(labels, slots, values, axis=1)
        np.put_along_axis(labelled, slots, True, axis=1)
        return to_batch(tokens, labels, labelled, lengths)
