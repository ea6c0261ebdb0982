"""Selective copying of MAD: tokens among blanks, which are asked for in their order at the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nested_jax.checks import Count, check_fields
from nested_jax.data.pipeline import Batch
from nested_jax.data.tasks.task import draw_lengths, to_batch


@dataclass(frozen=True)
class SelectiveCopying:
    """N random tokens at random places among blanks, a token that asks for them, then N blanks, whose labels are the tokens
    in their order. No other slot has a label.

    Tokens are those to copy, then the blank, then the one that asks. (In MAD's code the last token to copy always stands
    before the one that asks; here its place is random too.)

    Source: Poli et al. 2024 (Mechanistic design and scaling of hybrid architectures), selective copying.

    >>> batch = SelectiveCopying(number=2).sample(np.random.default_rng(0), 1, 8, 8)
    >>> batch.tokens, batch.targets
    (array([[14, 11,  8, 14, 14, 15, 14, 14]], dtype=int32), array([[ 0,  0,  0,  0,  0,  0, 11,  8]], dtype=int32))
    """

    number: Count = 16
    """Tokens N to copy."""
    different: Count = 14
    """Number of different tokens to copy."""

    def __post_init__(self):
        check_fields(self, "SelectiveCopying: ")

    @property
    def tokens(self) -> int:
        """Tokens to copy, the blank and the one that asks."""
        return self.different + 2

    @property
    def labels(self) -> int:
        """Tokens to copy."""
        return self.different

    def sample(self, rng: np.random.Generator, batch_size: int, shortest: int, longest: int) -> Batch:
        """Sequences of at least 2 N + 1 tokens, see `Task.sample`."""
        N, blank, asks = self.number, self.different, self.different + 1
        thing = f"selective copying of {N} tokens"
        lengths = draw_lengths(rng, thing, batch_size, shortest, longest, least=2 * N + 1)[:, None]
        slots, asked = np.arange(longest), lengths - N - 1  # (B, 1): the slot that asks
        copied = rng.integers(self.different, size=(batch_size, N))
        ranks = np.where(slots < asked, rng.random((batch_size, longest)), np.inf)
        tokens = np.full((batch_size, longest), blank)
        np.put_along_axis(tokens, np.sort(np.argsort(ranks, axis=1)[:, :N], axis=1), copied, axis=1)
        np.put_along_axis(tokens, asked, asks, axis=1)
        labels = np.take_along_axis(copied, np.clip(slots - asked - 1, 0, N - 1), axis=1)
        return to_batch(tokens, labels, slots > asked, lengths[:, 0])
