"""The text of a run: its tokenizer, training batches and held-out text, of which the run folder keeps a copy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import grain

from nested_jax.data import (
    ByteTokenizer,
    NgramBits,
    SentencePieceTokenizer,
    load_tokenizer,
    ngram_bits,
    open_documents,
    train_batches,
)
from nested_jax.data.ngrams import LIMIT
from nested_jax.data.text import Summary
from nested_jax.errors import UserError
from nested_jax.files import read_file, write_file
from nested_jax.train.config import TrainConfig
from nested_jax.train.evaluation import HeldOut, first_bytes
from nested_jax.train.folder import fingerprint
from nested_jax.train.sample import Tokenizer

TOKENIZER, HELDOUT = "tokenizer.model", "heldout.jsonl"
_MOST_HELDOUT = 2**24  # bytes of held-out text that a run folder keeps


class Text(NamedTuple):
    """The text of a run."""

    tokenizer: Tokenizer
    batches: grain.DatasetIterator
    """Of `Batch`es, without end."""
    heldout: HeldOut
    heldout_documents: list[bytes]
    """What `heldout` is made of."""
    documents: Sequence[bytes]
    """All held-out documents."""
    ngrams: NgramBits
    """Of what `heldout` is made of."""
    fingerprint: str
    """A digest of the documents."""
    summary: Summary
    """What was read and what was left out."""
    epoch: float
    """Targets of the documents read once; of TFDS datasets and of pieces, an estimate."""

    def save(self, folder: Path) -> None:
        """Writes the tokenizer, where the folder has none, and the held-out text, for its owner alone to read."""
        if not (folder / TOKENIZER).exists():
            self.tokenizer.save(folder / TOKENIZER)
        lines = [json.dumps(text.decode(errors="surrogateescape")) + "\n" for text in self.heldout_documents]
        if sum(map(len, self.heldout_documents)) <= _MOST_HELDOUT:
            write_file(folder / HELDOUT, "".join(lines).encode(), mode=0o600)
        else:
            (folder / HELDOUT).unlink(missing_ok=True)


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
    heldout_documents = open_documents(config.data, "heldout")
    first = list(first_bytes(heldout_documents, config.eval_bytes))
    heldout = HeldOut(config, tokenizer, first)  # it bounds the size of a batch before one is made
    batches = train_batches(
        documents,
        tokenizer,
        window=config.window,
        batch_size=config.batch_size,
        alignment=config.model.alignment,
        seed=config.seed,
        carry=config.carry,
    )
    ngrams = count_ngrams(config, tokenizer, documents, first)
    digest = fingerprint(documents, heldout_documents)
    return Text(
        tokenizer,
        batches,
        heldout,
        first,
        heldout_documents,
        ngrams,
        digest,
        documents.summary,
        targets_of(documents, tokenizer),
    )


def count_ngrams(
    config: TrainConfig, tokenizer: Tokenizer, documents: Sequence[bytes], heldout: Sequence[bytes]
) -> NgramBits:
    """Bits per byte of n-grams counted in as many tokens of training text as the run reads, up to `data.ngrams.LIMIT`.

    Args:
        config: of the run.
        tokenizer: of the run.
        documents: training text.
        heldout: text to predict.

    Returns:
        Those of the held-out text.
    """
    seen = config.steps * config.batch_size * config.window
    return ngram_bits(documents, heldout, tokenizer, limit=min(seen, LIMIT))


def read_heldout(folder: Path, config: TrainConfig, limit: int) -> list[bytes]:
    """The held-out text that a run folder keeps: nothing outside the folder is read.

    Args:
        folder: the run folder.
        config: of the run.
        limit: bytes to read.

    Returns:
        Documents of at most `limit` bytes, fewer where the run's own evaluations have read all there are.

    Raises:
        UserError: the folder keeps no held-out text, or fewer bytes than the run's text may have, or it is damaged.
    """
    name_it = f"name the text with --data (the run's was {config.data[:200]})"
    try:
        lines = read_file(folder / HELDOUT, 8 * _MOST_HELDOUT, within=folder).decode().splitlines()
        documents = [json.loads(line).encode(errors="surrogateescape") for line in lines]
    except FileNotFoundError:
        raise UserError(f"--run-dir {folder} keeps no held-out text: {name_it}") from None
    except (AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder / HELDOUT} is damaged: {name_it}") from None
    if limit > (kept := sum(map(len, documents))) and limit > config.eval_bytes:
        raise UserError(f"--eval-bytes {limit}: --run-dir {folder} keeps {kept} bytes of held-out text: {name_it}")
    return list(first_bytes(documents, limit))


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
        tokenizer = load_tokenizer(folder / TOKENIZER, within=folder)
    elif config.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    elif config.tokenizer == "sentencepiece":
        if vocabulary <= 2**8:
            raise UserError(
                f"--model.vocabulary {vocabulary} is too small for sentencepiece: give 1024, or --tokenizer bytes"
            )
        tokenizer = SentencePieceTokenizer.train(documents, vocabulary)
    elif Path(config.tokenizer).is_file():
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        raise UserError(f"--tokenizer {config.tokenizer} is no file: give sentencepiece, bytes or a saved tokenizer")
    if tokenizer.vocabulary > vocabulary:
        raise UserError(
            f"--model.vocabulary {vocabulary} is too small for --tokenizer {config.tokenizer}, "
            f"whose tokens go up to {tokenizer.vocabulary - 1}: give {tokenizer.vocabulary}"
        )
    return tokenizer
