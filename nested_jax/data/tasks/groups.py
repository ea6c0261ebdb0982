"""Word problems of groups: the product of the elements read so far."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nested_jax.checks import check_fields
from nested_jax.data.pipeline import Batch
from nested_jax.data.tasks.task import draw_lengths, to_batch


@dataclass(frozen=True)
class GroupWords:
    """Words of a group's elements; the label of a slot is the product of the elements up to and with it.

    Elements are permutations p = (p(0), p(1), ...) numbered in lexicographic order, so that 0 is the identity. A product
    x_1 x_2 ... x_t applies x_1 first: it takes i to x_t(... x_2(x_1(i))).

    S_3 is soluble and A_5, the even permutations of five things, is not: its word problem is complete for NC^1.

    Source: Liu et al. 2023 (Transformers learn shortcuts to automata); Merrill et al. 2024 (The illusion of state in
    state-space models).

    >>> GroupWords("s3").elements[:3]
    ((0, 1, 2), (0, 2, 1), (1, 0, 2))
    >>> batch = GroupWords("s3").sample(np.random.default_rng(0), 1, 4, 4)
    >>> batch.tokens, batch.targets
    (array([[5, 3, 3, 1]], dtype=int32), array([[5, 1, 2, 4]], dtype=int32))
    """

    group: Literal["s3", "a5"] = "s3"
    """All permutations of three things, or the even ones of five."""

    def __post_init__(self):
        check_fields(self, "GroupWords: ")

    @property
    def elements(self) -> tuple[tuple[int, ...], ...]:
        """The permutations, by token."""
        return _elements(self.group)

    @property
    def tokens(self) -> int:
        """Number of elements."""
        return len(self.elements)

    @property
    def labels(self) -> int:
        """Number of elements."""
        return len(self.elements)

    def sample(self, rng: np.random.Generator, batch_size: int, shortest: int, longest: int) -> Batch:
        """Words of any length, see `Task.sample`."""
        lengths = draw_lengths(rng, self.group, batch_size, shortest, longest)
        products = _products(self.group)
        tokens = rng.integers(self.tokens, size=(batch_size, longest))
        labels, product = np.zeros_like(tokens), np.zeros(batch_size, int)
        for t in range(longest):
            labels[:, t] = product = products[product, tokens[:, t]]
        return to_batch(tokens, labels, np.ones(longest, bool), lengths)


@functools.cache
def _elements(group: str) -> tuple[tuple[int, ...], ...]:
    size = int(group[1:])
    even = lambda p: sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0
    return tuple(p for p in itertools.permutations(range(size)) if group[0] == "s" or even(p))


@functools.cache
def _products(group: str) -> np.ndarray:
    """(G, G): the number of the product of two elements, the row's applied first."""
    elements = _elements(group)
    number = {p: i for i, p in enumerate(elements)}
    return np.array([[number[tuple(q[i] for i in p)] for q in elements] for p in elements])
