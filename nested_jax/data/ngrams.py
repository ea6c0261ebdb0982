"""What counting tokens, and pairs of tokens, predicts of a text: the baselines of a model's bits per byte."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from nested_jax.data.pipeline import encoded, first_targets
from nested_jax.data.tokenizer import Tokenizer
from nested_jax.errors import UserError

LIMIT = 2**20
"""Most tokens that are counted."""


class NgramBits(NamedTuple):
    """Cross-entropies of a text, in bits per byte."""

    unigram: float
    """Of tokens whose frequencies are known."""
    bigram: float
    """Of tokens whose frequencies after each token are known."""


def ngram_bits(
    counted: Sequence[str | bytes], read: Iterable[str | bytes], tokenizer: Tokenizer, *, limit: int = LIMIT
) -> NgramBits:
    """Bits per byte of documents under the counts of tokens, and of pairs of tokens, in other documents.

    With n the counts, N their sum, V the vocabulary and d(a) the number of different tokens seen after a:

        p(b) = (n(b) + 1) / (N + V)        p(b | a) = (n(a b) + d(a) p(b)) / (n(a) + d(a))

    Tokens are those that a model predicts: a document's own and the boundary after it.

    Args:
        counted: documents to count in, taken in an order drawn from a fixed seed.
        read: documents to predict.
        tokenizer: makes the tokens.
        limit: most tokens to count.

    Returns:
        Both cross-entropies.

    Raises:
        UserError: one of the texts is empty.

    Source: Witten and Bell, The zero-frequency problem (1991), method C.

    >>> from nested_jax.data import ByteTokenizer
    >>> bits = ngram_bits(["ab" * 500], ["ab" * 50], ByteTokenizer())
    >>> bits.bigram < 0.3 < bits.unigram
    True
    """
    V, read = tokenizer.vocabulary, list(read)
    if not len(counted) or not any(read):
        raise UserError("n-grams of no text: give documents that contain at least one byte")
    documents, order = encoded(counted, tokenizer), np.random.default_rng(0).permutation(len(counted))
    tokens = list(first_targets(map(np.asarray, (documents[int(i)] for i in order)), limit))
    targets = list(encoded(read, tokenizer))
    text_bytes = sum(int(tokenizer.byte_lengths[ids[1:]].sum()) for ids in targets)
    before, after = _pairs(tokens)
    single, pairs = np.bincount(after, minlength=V), _Counts(before, after, V)
    a, b = _pairs(targets)
    p = (single[b] + 1) / (single.sum() + V)
    total, different = np.bincount(before, minlength=V)[a], np.bincount(pairs.codes // V, minlength=V)[a]
    p_after = np.where(total > 0, (pairs(a, b) + different * p) / np.maximum(total + different, 1), p)
    return NgramBits(*(float(-np.log2(x).sum() / text_bytes) for x in (p, p_after)))


class _Counts:
    """Of pairs of tokens."""

    def __init__(self, before: np.ndarray, after: np.ndarray, vocabulary: int):
        self._vocabulary = vocabulary
        self.codes, self._counts = np.unique(before * vocabulary + after, return_counts=True)

    def __call__(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        code = before * self._vocabulary + after
        at = np.minimum(np.searchsorted(self.codes, code), len(self.codes) - 1)
        return np.where(self.codes[at] == code, self._counts[at], 0)


def _pairs(documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and the ones after them, within documents."""
    before, after = (np.concatenate([ids[part] for ids in documents]) for part in (slice(None, -1), slice(1, None)))
    return before.astype(np.int64), after.astype(np.int64)
