"""Entropies of bytes and of pairs of bytes: the baselines of a model's bits per byte."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from nested_jax.errors import UserError


class NgramEntropies(NamedTuple):
    """Empirical entropies of bytes, in bits per byte."""

    unigram: float
    """Entropy H(x_t) of a byte."""
    bigram: float
    """Entropy H(x_t | x_{t-1}) of a byte given the byte before it."""


def ngram_entropies(documents: Iterable[str | bytes]) -> NgramEntropies:
    """Empirical unigram and bigram (conditional) entropies of the bytes of documents, in bits per byte.

    They are lower bounds for any model of single bytes, and of pairs of bytes, on these documents. With p the relative
    frequencies of bytes and of pairs of bytes within a document:

        unigram = -sum_x p(x) log2 p(x),    bigram = -sum_xy p(x, y) log2 p(y | x)

    Args:
        documents: texts; strings are encoded as UTF-8.

    Returns:
        Both entropies.

    Raises:
        UserError: there are no bytes.

    >>> ngram_entropies(["abababab"])
    NgramEntropies(unigram=1.0, bigram=0.0)
    """
    single, pairs = np.zeros(2**8, np.int64), np.zeros(2**16, np.int64)
    for text in documents:
        codes = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int64)
        single += np.bincount(codes, minlength=2**8)
        pairs += np.bincount(codes[:-1] * 2**8 + codes[1:], minlength=2**16)
    if not single.any():
        raise UserError("entropies of no text: give documents that hold at least one byte")
    conditional = _entropy(pairs) - _entropy(pairs.reshape(2**8, 2**8).sum(axis=1)) if pairs.any() else 0.0
    return NgramEntropies(_entropy(single), conditional)


def _entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum()) + 0.0
