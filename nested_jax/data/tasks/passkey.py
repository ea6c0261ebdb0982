"""Passkey: a few digits after a marker somewhere among random digits, asked for at the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nested_jax.checks import Count, check_fields
from nested_jax.data.pipeline import Batch
from nested_jax.data.tasks.task import draw_lengths, to_batch


@dataclass(frozen=True)
class Passkey:
    """Random digits, somewhere among them a marker and after it the passkey's N digits; at the end N queries, one for each
    digit, whose labels are the digits. No other slot has a label.

    Tokens are the ten digits, the marker and the N queries. Nothing but the marker tells the passkey from the digits around
    it, and no digit of the passkey is repeated in the queries.

    Source: Mohtashami and Jaggi 2023 (Landmark attention), in tokens in place of words.

    >>> batch = Passkey(digits=2).sample(np.random.default_rng(1), 1, 12, 12)
    >>> batch.tokens
    array([[ 4,  5, 10,  9,  0,  1,  8,  9,  2,  3, 11, 12]], dtype=int32)
    >>> batch.targets
    array([[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0]], dtype=int32)
    """

    digits: Count = 4
    """Digits N of the passkey."""

    def __post_init__(self):
        check_fields(self, "Passkey: ")

    @property
    def tokens(self) -> int:
        """Ten digits, the marker and the queries."""
        return 11 + self.digits

    @property
    def labels(self) -> int:
        """Ten digits."""
        return 10

    def sample(self, rng: np.random.Generator, batch_size: int, shortest: int, longest: int) -> Batch:
        """Sequences of at least 2 N + 1 tokens, see `Task.sample`."""
        N, marker = self.digits, 10
        thing = f"a passkey of {N} digits"
        lengths = draw_lengths(rng, thing, batch_size, shortest, longest, least=2 * N + 1)[:, None]
        tokens = rng.integers(10, size=(batch_size, longest))
        place = rng.integers(lengths - 2 * N)  # (B, 1), of the marker
        passkey = np.take_along_axis(tokens, place + 1 + np.arange(N), axis=1)
        np.put_along_axis(tokens, place, marker, axis=1)
        query = np.arange(longest) - (lengths - N)  # which digit a slot asks for; negative where none
        tokens = np.where(query >= 0, marker + 1 + np.minimum(query, N - 1), tokens)
        labels = np.take_along_axis(passkey, np.clip(query, 0, N - 1), axis=1)
        return to_batch(tokens, labels, query >= 0, lengths[:, 0])
