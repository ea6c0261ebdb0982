"""Brackets of several kinds, each kind balanced for itself (Shuffle-2): which symbols may follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from nested_jax.checks import Interval, check_fields
from nested_jax.data.pipeline import Batch
from nested_jax.data.tasks.task import draw_lengths, to_batch


@dataclass(frozen=True)
class ShuffledBrackets:
    """Words of brackets that are balanced within each kind, whatever the other kinds do; the label of a slot is the set of
    symbols that may follow the word's part up to and with it.

    Token 2k opens kind k and token 2k + 1 closes it. Label sum_k 2^k [kind k is open somewhere]: every kind may open, those
    that are open may close, and the word may end where none is (label 0).

    A word has m pairs, whose kinds are drawn by frequencies of the word's own. Each pair opens at a random time in [0, 1)
    and closes after a random time of mean d / m; the depth d is drawn log-uniformly from 1/4 to 4 m for each word. So some
    words return to depth 0 all the time, and others first open nearly all brackets.

    Source: Suzgun et al. 2019 (Memory-augmented recurrent neural networks can learn generalized Dyck languages);
    Bhattamishra et al. 2020, for Shuffle-2.

    >>> batch = ShuffledBrackets(2).sample(np.random.default_rng(0), 1, 8, 8)
    >>> "".join("()[]"[token] for token in batch.tokens[0]), batch.targets[0].tolist()
    ('([(])[)]', [1, 3, 3, 1, 1, 3, 2, 0])
    """

    kinds: Annotated[int, Interval(least=1, below=31)] = 2
    """Kinds of brackets, at most 30: labels are sets of them, as int32."""

    def __post_init__(self):
        check_fields(self, "ShuffledBrackets: ")

    @property
    def tokens(self) -> int:
        """Two for each kind."""
        return 2 * self.kinds

    @property
    def labels(self) -> int:
        """One for each set of kinds that are open."""
        return 2**self.kinds

    def sample(self, rng: np.random.Generator, batch_size: int, shortest: int, longest: int) -> Batch:
        """Words of even lengths, see `Task.sample`."""
        lengths = draw_lengths(rng, f"shuffle-{self.kinds}", batch_size, shortest, longest, multiple=2)
        pairs = lengths[:, None] // 2  # (B, 1), of (B, M) with those beyond each word's own
        depth = (16 * pairs) ** rng.random((batch_size, 1)) / 4
        opened = rng.random((batch_size, longest // 2))
        closed = opened + depth / pairs * rng.standard_exponential(opened.shape)
        times = np.stack([opened, closed], axis=-1)  # (B, M, 2)
        times[np.arange(longest // 2) >= pairs] = np.inf
        order = np.argsort(times.reshape(batch_size, -1), axis=1)
        frequencies = rng.dirichlet(np.ones(self.kinds), batch_size).cumsum(axis=1)[:, None, :-1]  # (B, 1, K - 1)
        kind = (rng.random(opened.shape)[..., None] > frequencies).sum(axis=-1)
        tokens = np.stack([2 * kind, 2 * kind + 1], axis=-1).reshape(batch_size, -1)
        tokens = np.take_along_axis(tokens, order, axis=1)
        tokens = np.pad(tokens, [(0, 0), (0, longest % 2)])
        labels = np.zeros(tokens.shape, int)
        for k in range(self.kinds):
            change = (tokens == 2 * k).astype(int) - (tokens == 2 * k + 1)
            labels += 2**k * (change.cumsum(axis=1) > 0)
        return to_batch(tokens, labels, np.ones(longest, bool), lengths)
