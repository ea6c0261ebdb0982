"""Text to batches of tokens: documents, tokenizers, and a Grain pipeline that packs documents into windows."""

from nested_jax.data.entropy import NgramEntropies, ngram_entropies
from nested_jax.data.pipeline import Batch, heldout_batches, train_batches
from nested_jax.data.text import open_documents
from nested_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "NgramEntropies",
    "SentencePieceTokenizer",
    "Tokenizer",
    "heldout_batches",
    "load_tokenizer",
    "ngram_entropies",
    "open_documents",
    "train_batches",
]
