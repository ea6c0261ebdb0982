"""What a synthetic task is: sequences of tokens with the labels of some of their slots."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from nested_jax.data.pipeline import Batch
from nested_jax.errors import UserError, is_whole, shown
from nested_jax.typing import Array


class Task(Protocol):
    """Sequences drawn at random. `batch.targets` are labels; slots without one have weight 0.

    Labels are not fed back: nothing of a label is among the tokens up to its slot but what defines it.
    """

    @property
    def tokens(self) -> int:
        """Number of different tokens."""
        ...

    @property
    def labels(self) -> int:
        """Number of different labels."""
        ...

    def sample(self, rng: np.random.Generator, batch_size: int, shortest: int, longest: int) -> Batch:
        """Sequences of random lengths from `shortest` to `longest`, with empty slots up to `longest`.

        Args:
            rng: the source of randomness; the same state gives the same batch.
            batch_size: number B of sequences.
            shortest, longest: bounds of the lengths, in tokens.

        Returns:
            A `Batch` (B, longest) whose rows start afresh: `reset` is true at their first slots. Each has a label.

        Raises:
            UserError: no sequence of the task has such a length.
        """
        ...


def score(predicted: Array | np.ndarray, batch: Batch) -> tuple[float, float]:
    """Fractions of right labels, and of sequences with all labels right.

    Args:
        predicted: labels (B, T) of a model.
        batch: the task's.

    Returns:
        (right labels, right sequences), in [0, 1].

    >>> tokens, weights = np.zeros((2, 2), np.int32), np.ones((2, 2), np.float32)
    >>> score(np.array([[0, 0], [0, 1]]), Batch(tokens, tokens, weights, tokens == 1))
    (0.75, 0.5)
    """
    labelled = batch.weights > 0
    right = (np.asarray(predicted) == batch.targets) | ~labelled
    return float(right[labelled].mean()), float(right.all(axis=1).mean())


def draw_lengths(
    rng: np.random.Generator,
    thing: str,
    batch_size: int,
    shortest: int,
    longest: int,
    *,
    least: int = 1,
    multiple: int = 1,
) -> np.ndarray:
    """Lengths drawn uniformly from those that sequences of a task have.

    Args:
        rng: the source of randomness.
        thing: what the sequences are of, for the error.
        batch_size: number B of sequences.
        shortest, longest: bounds of the lengths, in tokens.
        least: tokens of the task's shortest sequence.
        multiple: all lengths are multiples of it.

    Returns:
        (B,) whole numbers.

    Raises:
        UserError: there is no such length, or a size is no whole number of at least 1.

    >>> draw_lengths(np.random.default_rng(0), "(aa)*", 3, 1, 3, multiple=2)
    array([2, 2, 2])
    >>> draw_lengths(np.random.default_rng(0), "(aa)*", 3, 3, 3, multiple=2)
    Traceback (most recent call last):
    nested_jax.errors.UserError: no sequence of (aa)* has from 3 to 3 tokens: give 4 or more as the longest
    """
    for name, value in (("batch_size", batch_size), ("shortest", shortest), ("longest", longest)):
        if not is_whole(value):
            raise UserError(f"{thing}: {name} {shown(value)}: give a whole number of at least 1")
    first, last = -(-max(shortest, least) // multiple), longest // multiple
    if first > last:
        bounds = f"from {shortest} to {longest} tokens"
        raise UserError(f"no sequence of {thing} has {bounds}: give {first * multiple} or more as the longest")
    return multiple * rng.integers(first, last + 1, size=batch_size)


def to_batch(tokens: np.ndarray, labels: np.ndarray, labelled: np.ndarray, lengths: np.ndarray) -> Batch:
    """A batch of sequences that start at the first slot.

    Args:
        tokens: (B, T); those from a sequence's end on do not count.
        labels: (B, T); only those of labelled slots count.
        labelled: (B, T) or (T,), which slots have a label where the sequence reaches them.
        lengths: (B,), of the sequences.

    Returns:
        The batch, 0 in all that does not count.

    >>> to_batch(np.array([[1, 1, 1]]), np.array([[1, 0, 1]]), np.array([False, True, True]), np.array([2])).targets
    array([[0, 0, 0]], dtype=int32)
    """
    slots = np.arange(tokens.shape[1])
    within = slots < lengths[:, None]
    labelled = labelled & within
    return Batch(
        np.where(within, tokens, 0).astype(np.int32),
        np.where(labelled, labels, 0).astype(np.int32),
        labelled.astype(np.float32),
        np.broadcast_to(slots == 0, tokens.shape).copy(),
    )


def draw_distinct(rng: np.random.Generator, rows: int, among: int, number: int) -> np.ndarray:
    """Different numbers below `among`, in random order, for each row.

    Args:
        rng: the source of randomness.
        rows: number B of rows.
        among: how many numbers there are.
        number: N of them to draw.

    Returns:
        (B, N) whole numbers.

    >>> sorted(draw_distinct(np.random.default_rng(0), 1, 3, 3)[0].tolist())
    [0, 1, 2]
    """
    return np.argsort(rng.random((rows, among)), axis=1)[:, :number]
