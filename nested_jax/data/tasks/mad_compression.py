"""Compression of MAD, for a causal model: random tokens, which are all asked for at the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nested_jax.checks import Count, check_fields
from nested_jax.data.pipeline import Batch
from nested_jax.data.tasks.task import draw_lengths, to_batch


@dataclass(frozen=True)
class Compression:
    """N random tokens, then N times the compression token, whose labels are the tokens in their order.

    In MAD an encoder reads the tokens and one compression token, and an MLP decodes every token from the encoder's last
    output and the token's position. A causal model has no such decoder: here it decodes itself, one token in each slot from
    the first compression token on. So a recurrent model must hold all tokens in its state, while attention may look back at
    them, which MAD's decoder may not.

    Source: Poli et al. 2024 (Mechanistic design and scaling of hybrid architectures), compression.

    >>> batch = Compression().sample(np.random.default_rng(0), 1, 6, 6)
    >>> batch.tokens, batch.targets
    (array([[12,  9,  7, 15, 15, 15]], dtype=int32), array([[ 0,  0,  0, 12,  9,  7]], dtype=int32))
    """

    different: Count = 15
    """Number of different tokens; the compression token comes after them."""

    def __post_init__(self):
        check_fields(self, "Compression: ")

    @property
    def tokens(self) -> int:
        """Different tokens and the compression token."""
        return self.different + 1

    @property
    def labels(self) -> int:
        """Different tokens."""
        return self.different

    def sample(self, rng: np.random.Generator, batch_size: int, shortest: int, longest: int) -> Batch:
        """Sequences of even lengths 2 N, see `Task.sample`."""
        lengths = draw_lengths(rng, "compression", batch_size, shortest, longest, multiple=2)
        slots, N = np.arange(longest), lengths[:, None] // 2
        tokens = rng.integers(self.different, size=(batch_size, longest))
        labels = np.take_along_axis(tokens, np.maximum(slots - N, 0), axis=1)
        return to_batch(np.where(slots < N, tokens, self.different), labels, slots >= N, lengths)
