"""The text of a run: its tokenizer, training batches and held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import grain

from nested_jax.data import ByteTokenizer, SentencePieceTokenizer, load_tokenizer, open_documents, train_batches
from nested_jax.errors import UserError
from nested_jax.train.config import TrainConfig
from nested_jax.train.evaluation import HeldOut
from nested_jax.train.folder import fingerprint
from nested_jax.train.sample import Tokenizer

TOKENIZER = "tokenizer.model"


class Text(NamedTuple):
    """The text of a run."""

    tokenizer: Tokenizer
    batches: grain.DatasetIterator
    """Of `Batch`es, without end."""
    heldout: HeldOut
    fingerprint: str
    """A digest of the documents."""
    epoch: float
    """Targets of the documents read once; of TFDS datasets and of pieces, an estimate."""


def open_text(config: TrainConfig, folder: Path | None) -> Text:
    """Opens the text of a config.

    Args:
        config: of the run.
        folder: the folder of a run to resume, which has the tokenizer; None for a new run.

    Returns:
        The text.

    Raises:
        UserError: text, tokenizer and model do not fit together.
    """
    documents = open_documents(config.data, "train")
    tokenizer = choose_tokenizer(config, documents, folder)
    batches = train_batches(
        documents,
        tokenizer,
        window=config.window,
        batch_size=config.batch_size,
        alignment=config.model.alignment,
        seed=config.seed,
        carry=config.carry,
    )
    heldout_documents = open_documents(config.data, "heldout")
    heldout = HeldOut(config, tokenizer, heldout_documents, limit=config.eval_bytes)
    return Text(tokenizer, batches, heldout, fingerprint(documents, heldout_documents), targets_of(documents, tokenizer))


def targets_of(documents: Sequence[bytes], tokenizer: Tokenizer, *, most: int = 200) -> float:
    """Targets of documents: exact for bytes of a list, else from the bytes and targets of so many documents.

    Args:
        documents: texts, by index.
        tokenizer: theirs.
        most: documents that are read, evenly spaced.

    Returns:
        Their number.

    >>> targets_of([b"abc", b"de"], ByteTokenizer())
    7
    """
    length = len(documents)
    some = [documents[i * length // min(length, most)] for i in range(min(length, most))]
    text = sum(map(len, documents)) if isinstance(documents, list) else sum(map(len, some)) * length / len(some)
    if isinstance(tokenizer, ByteTokenizer):
        return text + length
    pieces = sum(len(tokenizer.encode(document)) for document in some)
    return text * pieces / max(sum(map(len, some)), 1) + length


def choose_tokenizer(config: TrainConfig, documents: Sequence[bytes], folder: Path | None) -> Tokenizer:
    """The tokenizer of a run.

    Args:
        config: its `tokenizer` is used where the folder has none.
        documents: text to train a tokenizer on.
        folder: the folder of a run to resume; None for a new run.

    Returns:
        The tokenizer.

    Raises:
        UserError: the model has fewer tokens than the tokenizer, or the tokenizer cannot be made.
    """
    vocabulary = config.model.vocabulary
    if folder and (folder / TOKENIZER).exists():
        tokenizer = load_tokenizer(folder / TOKENIZER)
    elif config.tokenizer == "byte":
        tokenizer = ByteTokenizer()
    elif config.tokenizer == "sentencepiece":
        if vocabulary <= 2**8:
            raise UserError(f"--model.vocabulary {vocabulary} is too small for --tokenizer sentencepiece: give 4096")
        tokenizer = SentencePieceTokenizer.train(documents, vocabulary)
    elif Path(config.tokenizer).is_file():
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        raise UserError(f"--tokenizer {config.tokenizer} is no file: give byte, sentencepiece or a saved tokenizer")
    if tokenizer.vocabulary > vocabulary:
        raise UserError(
            f"--model.vocabulary {vocabulary} is too small for --tokenizer {config.tokenizer}, "
            f"whose tokens go up to {tokenizer.vocabulary - 1}: give {tokenizer.vocabulary}"
        )
    return tokenizer
