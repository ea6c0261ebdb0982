"""Text in, batches out: TFDS for what is read, Grain for the order it is read in."""

from nested_jax.data.entropy import NgramEntropies, ngram_entropies
from nested_jax.data.pipeline import Batch, HeldoutBatches, PackedWindows, heldout_batches, train_batches
from nested_jax.data.text import LocalText, open_documents
from nested_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "HeldoutBatches",
    "LocalText",
    "NgramEntropies",
    "PackedWindows",
    "SentencePieceTokenizer",
    "Tokenizer",
    "heldout_batches",
    "load_tokenizer",
    "ngram_entropies",
    "open_documents",
    "train_batches",
]
