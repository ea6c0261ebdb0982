"""Text to batches of tokens: documents, tokenizers, and a Grain pipeline that packs documents into windows."""

from nested_jax.data.ngrams import NgramBits, ngram_bits
from nested_jax.data.pipeline import Batch, heldout_batches, train_batches
from nested_jax.data.text import open_documents
from nested_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "NgramBits",
    "SentencePieceTokenizer",
    "Tokenizer",
    "heldout_batches",
    "load_tokenizer",
    "ngram_bits",
    "open_documents",
    "train_batches",
]
