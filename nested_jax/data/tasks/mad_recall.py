"""In-context recall of MAD, without and with noise: values of keys that were read before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from nested_jax.checks import Interval, check_fields
from nested_jax.data.pipeline import Batch
from nested_jax.data.tasks.task import draw_lengths, to_batch


@dataclass(frozen=True)
class InContextRecall:
    """Pairs k v k v ... of a map from keys to values that is drawn anew for each sequence; the label of a key's slot is its
    value, where the key was read before.

    Tokens are `keys` keys, then as many values, then noise. With noise, a pair is two noise tokens instead with some
    probability. The last key of a sequence is one that was read before. In training, MAD predicts every token; here only
    what can be known has a label, as in its tests.

    Source: Poli et al. 2024 (Mechanistic design and scaling of hybrid architectures), in-context recall and noisy in-context
    recall, with several queries.

    >>> batch = InContextRecall(keys=2).sample(np.random.default_rng(0), 1, 7, 7)
    >>> batch.tokens, batch.targets
    (array([[1, 3, 1, 3, 1, 3, 1]], dtype=int32), array([[0, 0, 3, 0, 3, 0, 3]], dtype=int32))
    """

    keys: Annotated[int, Interval(least=2)] = 8
    """Number of keys, and of values."""
    noise_tokens: Annotated[int, Interval(least=1)] = 16
    """Number of noise tokens, where there is noise."""
    noise: Annotated[float, Interval(least=0, below=1)] = 0.0
    """Probability that noise stands in the place of a pair."""

    def __post_init__(self):
        check_fields(self, "InContextRecall: ")

    @property
    def tokens(self) -> int:
        """Keys, values and noise."""
        return 2 * self.keys + (self.noise_tokens if self.noise else 0)

    @property
    def labels(self) -> int:
        """Labels are values, numbered as tokens."""
        return 2 * self.keys

    def sample(self, rng: np.random.Generator, batch_size: int, shortest: int, longest: int) -> Batch:
        """Sequences of at least 3 tokens, of odd length where they end in a key, see `Task.sample`."""
        thing = "noisy in-context recall" if self.noise else "in-context recall"
        lengths = draw_lengths(rng, thing, batch_size, shortest, longest, least=3)
        rows, pairs = np.arange(batch_size), (longest + 1) // 2
        keys = rng.integers(self.keys, size=(batch_size, pairs))
        last = (lengths - 1) // 2
        asked = rng.integers(last)  # an earlier pair, whose key is the last one
        keys[rows, last] = keys[rows, asked]
        noisy = rng.random(keys.shape) < self.noise
        noisy[rows, last] = noisy[rows, asked] = False
        values = np.take_along_axis(rng.integers(self.keys, 2 * self.keys, size=(batch_size, self.keys)), keys, axis=1)
        labelled = ~noisy & seen_before(np.where(noisy, -1, keys), self.keys)
        tokens = np.stack([keys, values], axis=-1)
        tokens = np.where(noisy[..., None], 2 * self.keys + rng.integers(self.noise_tokens, size=tokens.shape), tokens)
        flat = lambda x: x.reshape(batch_size, -1)[:, :longest]
        return to_batch(
            flat(tokens), values.repeat(2, axis=1)[:, :longest], flat(labelled[..., None] & [True, False]), lengths
        )


def seen_before(numbers: np.ndarray, most: int) -> np.ndarray:
    """Which entries stand in an earlier place of their row too.

    Args:
        numbers: (B, N) whole numbers; negative ones are not compared.
        most: they are below it.

    Returns:
        (B, N) bools.

    >>> seen_before(np.array([[1, 0, 1, 1]]), 2)
    array([[False, False,  True,  True]])
    """
    place, seen = np.arange(numbers.shape[1]), np.zeros(numbers.shape, bool)
    for number in range(most):
        same = numbers == number
        seen |= same & (place > same.argmax(axis=1)[:, None])
    return seen
