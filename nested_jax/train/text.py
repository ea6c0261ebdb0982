"""The text of a run: its tokenizer, training batches and held-out text, of which the run folder keeps a copy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nested_jax.data import (
    Batch,
    ByteTokenizer,
    NgramBits,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    ngram_bits,
    open_documents,
    train_batches,
)
from nested_jax.data.ngrams import LIMIT
from nested_jax.data.pipeline import TrainBatches
from nested_jax.data.text import Summary
from nested_jax.errors import UserError
from nested_jax.files import read_file, write_file
from nested_jax.train import reading, text_report
from nested_jax.train.config import TrainConfig
from nested_jax.train.evaluation import HeldOut, first_bytes
from nested_jax.train.folder import fingerprint
from nested_jax.train.report import TEMPERATURE, Outcome
from nested_jax.train.sample import characters, sample
from nested_jax.typing import PyTree

TOKENIZER, HELDOUT = "tokenizer.model", "heldout.jsonl"
_MOST_HELDOUT = 2**24  # bytes of held-out text that a run folder keeps


class Text(NamedTuple):
    """The text of a run, a `Source`."""

    config: TrainConfig
    tokenizer: Tokenizer
    batches: TrainBatches
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
    contents: Summary
    """What was read and what was left out."""
    epoch: float
    """Targets of the documents read once; of TFDS datasets and of pieces, an estimate."""

    @property
    def name(self) -> str:
        """What it is, for errors."""
        return "the text of --data"

    @property
    def unit(self) -> str:
        """What a target is."""
        return "tokens"

    def lines(self) -> list[str]:
        """The size of an epoch, what was read, and what is held out."""
        held_out = f"{self.heldout.text_bytes:,} bytes held out, {text_report.counting(self.ngrams)}"
        return [f"{self.epoch:,.0f} an epoch", f"{self.config.data}: {self.contents}", f"{self.config.data}: {held_out}"]

    def text_bytes(self, batch: Batch) -> float:
        """Bytes of text that a batch's targets stand for."""
        return float((self.tokenizer.byte_lengths[batch.targets] * batch.weights).sum())

    def numbers(self, bits: float, text_bytes: float, targets: int) -> dict[str, float]:
        """Bits per byte of an update's text, and the times that the text was read."""
        return {"bits_per_byte": bits / max(text_bytes, 1), "epoch": targets / self.epoch}

    def compile(self, params: PyTree) -> None:
        """Compiles what `evaluate` runs."""
        self.heldout.compile(params)

    def evaluate(self, params: PyTree, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Bits per byte of the held-out text, loss and perplexity by its targets, and what counting gives."""
        if (bits := self.heldout.bits_per_byte(params, stop=stop)) is None:
            return None
        loss = bits * math.log(2) * self.heldout.text_bytes / self.heldout.targets
        row = {"heldout_bits_per_byte": bits, "heldout_loss": loss, "heldout_perplexity": math.exp(min(loss, 700.0))}
        return row | self.ngrams._asdict()

    def layer_surprise(self, params: PyTree) -> dict[str, float]:
        """As `Source.layer_surprise`."""
        return self.heldout.layer_surprise(params)

    def summary(self, row: dict[str, Any]) -> str:
        """Bits per byte, and those of counting."""
        return f"held-out {row['heldout_bits_per_byte']:.3f} bits/byte, {text_report.counting(self.ngrams)}"

    def report(self, folder: Path, params: PyTree, rows: list[dict[str, Any]], targets: int) -> Outcome:
        """As `Source.report`: draws loss.png and reading.png, and a sample of the model's text."""
        config, last = self.config, [row for row in rows if "heldout_loss" in row][-1]
        text_report.draw_bits(folder, rows, self.ngrams)
        options = {"tokens": config.sample_tokens, "temperature": TEMPERATURE, "seed": config.seed}
        ids = sample(config.model, params, self.tokenizer, **options)
        written = "".join(characters(self.tokenizer, ids))
        return Outcome(
            config.data,
            text_report.results(last, self.ngrams, self.heldout.text_bytes),
            f"{targets:,}, {targets / self.epoch:.2f} epochs",
            self.unit,
            [reading.report_on(config, params, self.tokenizer, self.documents, folder)],
            written,
        )

    def farewell(self, folder: Path) -> str:
        """How to have text written."""
        return f"nested-jax generate --run-dir {folder} writes text"

    def save(self, folder: Path) -> None:
        """Writes the tokenizer, where the folder has none, and the held-out text, for its owner alone to read."""
        if not (folder / TOKENIZER).exists():
            self.tokenizer.save(folder / TOKENIZER)
        lines = [json.dumps(text.decode(errors="surrogateescape")) + "\n" for text in self.heldout_documents]
        if sum(map(len, self.heldout_documents)) <= _MOST_HELDOUT:
            write_file(folder / HELDOUT, "".join(lines).encode(), mode=0o600)
        else:
            (folder / HELDOUT).unlink(missing_ok=True)


def open_text(config: TrainConfig, folder: Path | None, rows: Sequence[int] | None = None) -> Text:
    """Opens the text of a config.

    Args:
        config: of the run.
        folder: the folder of a run to resume, which has the tokenizer; None for a new run.
        rows: of a training batch, which this process reads; None: all.

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
        rows=rows,
    )
    ngrams = count_ngrams(config, tokenizer, documents, first)
    digest = fingerprint(documents, heldout_documents)
    return Text(
        config,
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
