"""What counting tokens predicts, against the formula as a loop and against sources whose entropy is known."""

import math
from collections import Counter

import numpy as np
import pytest

from nested_jax import UserError
from nested_jax.data import ByteTokenizer, SentencePieceTokenizer, ngram_bits, open_documents

BYTES = ByteTokenizer()


def reference(counted: list[str], read: list[str], tokenizer) -> tuple[float, float]:
    edge, V = tokenizer.boundary, tokenizer.vocabulary
    documents = lambda texts: [[edge, *map(int, tokenizer.encode(text)), edge] for text in texts]
    single, pairs = Counter(), Counter()
    for ids in documents(counted):
        single.update(ids[1:])
        pairs.update(zip(ids, ids[1:], strict=False))
    bits, text_bytes = [0.0, 0.0], 0
    for ids in documents(read):
        for a, b in zip(ids, ids[1:], strict=False):
            p = (single[b] + 1) / (single.total() + V)
            after = {y: n for (x, y), n in pairs.items() if x == a}
            conditional = (after.get(b, 0) + len(after) * p) / (sum(after.values()) + len(after)) if after else p
            bits[0] -= math.log2(p)
            bits[1] -= math.log2(conditional)
            text_bytes += int(tokenizer.byte_lengths[b])
    return bits[0] / text_bytes, bits[1] / text_bytes


@pytest.mark.parametrize("pieces", [False, True])
def test_counts_are_those_of_the_formula(pieces):
    counted, read = ["the cat sat on the mat", "a dog", "", "the dog sat"], ["the dog on a mat zz", "", "cats"]
    tokenizer = SentencePieceTokenizer.train(counted * 20, 290) if pieces else BYTES
    assert ngram_bits(counted, read, tokenizer) == pytest.approx(reference(counted, read, tokenizer), rel=1e-12)


def test_known_sources():
    uniform = np.random.default_rng(0).integers(97, 105, size=100_000).astype(np.uint8).tobytes()
    assert ngram_bits([uniform], [uniform[:50_000]], BYTES) == pytest.approx((3.0, 3.0), abs=0.01)
    assert ngram_bits(["ab" * 10**4], ["ab" * 10**4], BYTES) == pytest.approx((1.0, 0.0), abs=0.02)
    assert ngram_bits(["aabb" * 10**4], ["aabb" * 10**4], BYTES).bigram == pytest.approx(1.0, abs=0.01)
    alone, more = (ngram_bits(["ab" * 10**4, "cd" * 10**4], ["ab" * 99], BYTES, limit=limit) for limit in (100, 10**6))
    assert alone != more, "no more than the limit is counted"
    for counted, read in (([], ["a"]), (["a"], []), (["a"], ["", ""])):
        with pytest.raises(UserError, match="^n-grams of no text: give documents"):
            ngram_bits(counted, read, BYTES)


def test_the_standard_library():
    counted, read = open_documents("stdlib"), open_documents("stdlib", "heldout")
    bits = ngram_bits(counted, read[:4], BYTES, limit=300_000)
    assert 4.2 < bits.unigram < 5.0 and 3.1 < bits.bigram < 3.9
