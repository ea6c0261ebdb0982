"""Fuzzy in-context recall of MAD: keys and values of several tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nested_jax.checks import Count, check_fields
from nested_jax.data.pipeline import Batch
from nested_jax.data.tasks.mad_recall import seen_before
from nested_jax.data.tasks.task import draw_distinct, draw_lengths, to_batch
from nested_jax.errors import UserError


@dataclass(frozen=True)
class FuzzyRecall:
    """Keys of K tokens, each followed by its value of 1 to W tokens; where a key was read before, the label of its last slot
    is the value's first token, and the labels of the value's slots are its next tokens. The last token has no label.

    Key tokens are the first `letters` tokens, value tokens the `letters` after them; a key, or a value, has no token twice.
    The map from keys to values is drawn anew for each sequence, and the last key is one that was read before. As in MAD's
    tests, all keys have the largest size: so a key's end is known. Other than there, each sequence has `keys` different
    keys, so that most of them recur, and no padding.

    Source: Poli et al. 2024 (Mechanistic design and scaling of hybrid architectures), fuzzy in-context recall.

    >>> batch = FuzzyRecall(keys=1).sample(np.random.default_rng(0), 1, 12, 12)
    >>> batch.tokens
    array([[ 5,  4,  6, 11, 10,  9,  5,  4,  6, 11, 10,  9]], dtype=int32)
    >>> batch.targets
    array([[ 0,  0,  0,  0,  0,  0,  0,  0, 11, 10,  9,  0]], dtype=int32)
    """

    keys: Count = 8
    """Number of different keys in a sequence."""
    letters: Count = 8
    """Number of tokens that keys are made of, and of those that values are made of."""
    key_size: Count = 3
    """Tokens K of a key."""
    value_size: Count = 3
    """Most tokens W of a value."""

    def __post_init__(self):
        check_fields(self, "FuzzyRecall: ")
        if self.letters < (size := max(self.key_size, self.value_size)):
            raise UserError(f"FuzzyRecall: letters {self.letters} for keys or values of {size} tokens: give {size} or more")
        if self.keys > (most := math.perm(self.letters, self.key_size)):
            raise UserError(f"FuzzyRecall: keys {self.keys}, of {most} that there are: give {most} or fewer")
        if most > 2**20:  # each row shuffles them
            raise UserError(
                f"FuzzyRecall: letters {self.letters} and key_size {self.key_size} make {most:.0e} keys: give less"
            )

    @property
    def tokens(self) -> int:
        """Tokens of keys and of values."""
        return 2 * self.letters

    @property
    def labels(self) -> int:
        """Labels are tokens of values, numbered as tokens."""
        return 2 * self.letters

    def sample(self, rng: np.random.Generator, batch_size: int, shortest: int, longest: int) -> Batch:
        """Sequences of at least 2 K + W tokens, the last pair cut short, see `Task.sample`."""
        K, W = self.key_size, self.value_size
        lengths = draw_lengths(rng, "fuzzy in-context recall", batch_size, shortest, longest, least=2 * K + W)
        rows = np.arange(batch_size)
        values = self.letters + draw_distinct(rng, batch_size * self.keys, self.letters, W)
        pairs = np.concatenate([self._keys(rng, batch_size), values.reshape(batch_size, self.keys, W)], axis=-1)
        sizes = K + rng.integers(1, W + 1, size=(batch_size, self.keys))
        chosen = rng.integers(self.keys, size=(batch_size, longest // (K + 1) + 1))  # of the pairs, one after the other
        starts = lambda: (
            np.cumsum(np.take_along_axis(sizes, chosen, axis=1), axis=1) - np.take_along_axis(sizes, chosen, axis=1)
        )
        last = (starts() + K <= lengths[:, None]).sum(axis=1) - 1  # the last key that is whole
        chosen[rows, last] = chosen[rows, rng.integers(last)]
        begins = np.zeros((batch_size, longest + W + K), int)
        np.put_along_axis(begins, np.minimum(starts(), longest + W), 1, axis=1)
        place = begins[:, :longest].cumsum(axis=1) - 1  # (B, T): which pair, then which of its tokens
        offset = np.arange(longest) - np.take_along_axis(starts(), place, axis=1)
        pair = np.take_along_axis(chosen, place, axis=1)
        seen = np.take_along_axis(seen_before(chosen, self.keys), place, axis=1)
        labelled = seen & (offset >= K - 1) & (offset < np.take_along_axis(sizes, pair, axis=1) - 1)
        following = pairs[rows[:, None], pair, np.minimum(offset + 1, K + W - 1)]
        return to_batch(pairs[rows[:, None], pair, offset], following, labelled, lengths)

    def _keys(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        """(B, keys, K): different keys for each row, by numbers whose digits choose among the letters that are left."""
        choices = np.arange(self.letters, self.letters - self.key_size, -1)
        left = draw_distinct(rng, rows, int(np.prod(choices)), self.keys)
        free = np.broadcast_to(np.arange(self.letters), (*left.shape, self.letters))
        keys = []
        for choice in choices:
            left, digit = np.divmod(left, choice)
            keys.append(np.take_along_axis(free, digit[..., None], axis=-1))
            kept = np.arange(choice - 1) + (np.arange(choice - 1) >= digit[..., None])
            free = np.take_along_axis(free, kept, axis=-1)
        return np.concatenate(keys, axis=-1)
