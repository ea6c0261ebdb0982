"""Packing documents into windows of tokens: a Grain pipeline, seeded, sharded, exactly resumable.

A document becomes boundary, ids, boundary. Its inputs are all of these but the last, its targets all but the first.
A window has T slots. Each document starts at a multiple of `alignment` slots (where chunks and periods start), counted
from the window's first slot or, with `carry`, from the row's first window. The slots before it are empty (boundary as
token and target, weight 0). A document that is longer than its window continues in the same row of the next batch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from nested_jax.data.tokenizer import Tokenizer
from nested_jax.errors import UserError, is_whole, shown

_READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class Batch(NamedTuple):
    """Windows of tokens and the targets of their slots. Shapes are (B, T); of one window, (T,)."""

    tokens: np.ndarray
    """int32: inputs."""
    targets: np.ndarray
    """int32: the token after each input."""
    weights: np.ndarray
    """float32: 1 where a slot has a target, 0 where it is empty."""
    reset: np.ndarray
    """bool: true where the fast state restarts before this slot."""


def train_batches(
    documents: Sequence[str | bytes] | grain.MapDataset,
    tokenizer: Tokenizer,
    *,
    window: int,
    batch_size: int,
    alignment: int,
    seed: int,
    carry: bool = False,
    rows: Sequence[int] | None = None,
) -> TrainBatches:
    """An endless iterator of `Batch`es.

    Every row reads a stream of its own, of documents shuffled anew each epoch, so that consecutive batches hold
    consecutive windows of a document in the same row.

    Args:
        documents: texts, by index.
        tokenizer: encodes a text when it is read.
        window: slots T of a window.
        batch_size: rows B of a batch.
        alignment: documents start at multiples of this many slots.
        seed: of the order of the documents.
        carry: whether fast state is carried from window to window: then `reset` is true at each document's first token
            only, else at each window's first slot too.
        rows: of a batch, which alone are read, as by one of several processes; None: all.

    Returns:
        An iterator. Its `get_state` and `set_state` give and take its position (a small JSON value).

    Raises:
        UserError: sizes do not fit together, a batch has no such row, or there are no documents.

    >>> from nested_jax.data.tokenizer import ByteTokenizer
    >>> batches = train_batches(["abcde"], ByteTokenizer(), window=4, batch_size=1, alignment=2, seed=0)
    >>> next(batches).tokens, next(batches).tokens  # 0 a b c; d e, and the document again
    (array([[ 0, 97, 98, 99]], dtype=int32), array([[100, 101,   0,  97]], dtype=int32))
    """
    pack = _packing(tokenizer, window, batch_size, alignment, carry)
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])  # Grain adds the epoch: keep seeds far apart
    stream, own = encoded(documents, tokenizer).shuffle(seed=seed).repeat(), range(batch_size) if rows is None else rows
    if len(own) == 0 or not 0 <= min(own) <= max(own) < batch_size:
        raise UserError(f"rows {shown(list(own))} of batch_size {batch_size}: give some of 0 to {batch_size - 1}")
    return TrainBatches({row: iter(pack(stream[row::batch_size])) for row in own})


class TrainBatches:
    """An endless iterator of `Batch`es, which `train_batches` makes.

    Its state is that of each row, by its number as a string; it may be given those of other rows too.
    """

    def __init__(self, rows: dict[int, grain.DatasetIterator]):
        self._rows = rows

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        return _stack([next(windows) for windows in self._rows.values()])

    def get_state(self) -> dict[str, Any]:
        """The position of each row."""
        return {str(row): windows.get_state() for row, windows in self._rows.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        for row, windows in self._rows.items():
            windows.set_state(state[str(row)])


class HeldoutBatches:
    """An iterable of `Batch`es, which `heldout_batches` makes. It may be iterated any number of times."""

    def __init__(
        self,
        documents: grain.MapDataset,
        byte_lengths: np.ndarray,
        streams: Callable[[], list[Iterator[Batch]]],
        empty: Batch,
    ):
        self._documents, self._byte_lengths, self._streams, self._empty = documents, byte_lengths, streams, empty

    def __iter__(self) -> Iterator[Batch]:
        return map(_stack, itertools.zip_longest(*self._streams(), fillvalue=self._empty))

    @functools.cached_property
    def text_bytes(self) -> int:
        """Bytes of text that all targets stand for: bits per byte is their summed loss, in bits, over this number."""
        return sum(int(self._byte_lengths[document[1:]].sum()) for document in self._documents)

    @functools.cached_property
    def targets(self) -> int:
        """Number of targets, the boundary after each document included."""
        return sum(len(document) - 1 for document in self._documents)


def heldout_batches(
    documents: Sequence[str | bytes] | grain.MapDataset,
    tokenizer: Tokenizer,
    *,
    window: int,
    batch_size: int,
    alignment: int,
    carry: bool = False,
    limit_tokens: int | None = None,
) -> HeldoutBatches:
    """`Batch`es that hold each target of the documents once.

    With `carry`, rows hold consecutive windows of a document, as in `train_batches`; else windows follow one another along
    the rows. Empty rows at the end have weight 0.

    Args:
        documents, tokenizer, window, batch_size, alignment, carry: as of `train_batches`.
        limit_tokens: the batches end after this many targets; None: after all.

    Returns:
        An iterable, with the number of its `targets` and the number of `text_bytes` that they stand for.

    Raises:
        UserError: sizes do not fit together, or there are no documents.

    >>> from nested_jax.data.tokenizer import ByteTokenizer
    >>> batches = heldout_batches(["abc", "de"], ByteTokenizer(), window=4, batch_size=3, alignment=1)
    >>> batches.targets, batches.text_bytes
    (7, 5)
    >>> [batch.weights.sum(axis=1).tolist() for batch in batches]
    [[4.0, 3.0, 0.0]]
    """
    pack = _packing(tokenizer, window, batch_size, alignment, carry)
    bounded = encoded(documents, tokenizer)
    if limit_tokens is not None:
        if not is_whole(limit_tokens):
            raise UserError(f"limit_tokens {limit_tokens} must be a whole number of at least 1")
        bounded = grain.MapDataset.source(list(first_targets(bounded, limit_tokens)))

    def streams() -> list[Iterator[Batch]]:
        return (
            [iter(pack(bounded[row::batch_size])) for row in range(batch_size)]
            if carry
            else [iter(pack(bounded))] * batch_size
        )

    return HeldoutBatches(bounded, tokenizer.byte_lengths, streams, _empty(window, tokenizer.boundary, carry))


class PackedWindows(grain.IterDataset):
    """Packs documents, (n,) int32 that start and end in a boundary, into windows: `Batch`es without the batch axis."""

    def __init__(self, documents: grain.IterDataset, *, window: int, alignment: int, boundary: int, carry: bool):
        super().__init__(documents)
        self._options = {"window": window, "alignment": alignment, "boundary": boundary, "carry": carry}

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedWindowsIterator(iter(self._parent), **self._options)


class _PackedWindowsIterator(grain.DatasetIterator):
    """Its state: the parent's state before the current document, how many of the document's inputs were read, and, with
    `carry`, the position of the next window in its row, modulo the alignment."""

    def __init__(self, parent: grain.DatasetIterator, *, window: int, alignment: int, boundary: int, carry: bool):
        super().__init__(parent)
        self._window, self._alignment, self._boundary, self._carry = window, alignment, boundary, carry
        self._document: np.ndarray | None = None
        self._offset = self._position = 0

    def __next__(self) -> Batch:
        packed, slot = _empty(self._window, self._boundary, self._carry), 0
        self._read()  # StopIteration here: no empty window follows the last document
        while True:
            if self._offset == 0:
                slot += -(self._position + slot) % self._alignment
            if slot >= self._window:
                break
            try:
                document = self._read()
            except StopIteration:
                break
            size = min(self._window - slot, len(document) - 1 - self._offset)
            here, there = slice(slot, slot + size), slice(self._offset, self._offset + size)
            packed.tokens[here] = document[:-1][there]
            packed.targets[here] = document[1:][there]
            packed.weights[here] = 1
            packed.reset[slot] |= self._offset == 0
            slot, self._offset = slot + size, self._offset + size
            if self._offset == len(document) - 1:
                self._document, self._offset = None, 0
        if self._carry:
            self._position = (self._position + self._window) % self._alignment
        return packed

    def _read(self) -> np.ndarray:
        """The current document, else the next one."""
        if self._document is not None:
            return self._document
        self._before = self._parent.get_state()
        self._document = document = next(self._parent)
        return document

    def get_state(self) -> dict[str, Any]:
        before = self._parent.get_state() if self._document is None else self._before
        return {"parent": before, "offset": self._offset, "position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._document, self._offset, self._position = None, state["offset"], state["position"]


def _packing(
    tokenizer: Tokenizer, window: int, batch_size: int, alignment: int, carry: bool
) -> Callable[[grain.MapDataset], PackedWindows]:
    """A function from a dataset of documents to its windows. Raises UserError for a size below 1."""
    for name, value in (("window", window), ("batch_size", batch_size), ("alignment", alignment)):
        if not is_whole(value):
            raise UserError(f"{name} {value} must be a whole number of at least 1")
    options = {"window": window, "alignment": alignment, "boundary": tokenizer.boundary, "carry": carry}
    return lambda documents: PackedWindows(documents.to_iter_dataset(_READ), **options)


def encoded(documents: Sequence[str | bytes] | grain.MapDataset, tokenizer: Tokenizer) -> grain.MapDataset:
    """Documents as ids between two boundaries, encoded when read."""
    if len(documents) == 0:
        raise UserError("no documents to make batches of: give at least one")
    boundary = np.array([tokenizer.boundary], np.int32)
    dataset = documents if isinstance(documents, grain.MapDataset) else grain.MapDataset.source(documents)
    return dataset.map(lambda text: np.concatenate([boundary, tokenizer.encode(text), boundary]))


def first_targets(documents: Iterable[np.ndarray], limit: int) -> Iterator[np.ndarray]:
    """Documents up to `limit` targets in all, the last one cut."""
    for document in documents:
        yield document[: limit + 1]
        limit -= len(document) - 1
        if limit <= 0:
            return


def _empty(window: int, boundary: int, carry: bool) -> Batch:
    """A window of empty slots."""
    token = np.full(window, boundary, np.int32)
    reset = np.zeros(window, bool)
    reset[0] = not carry
    return Batch(token, token.copy(), np.zeros(window, np.float32), reset)


def _stack(windows: Sequence[Batch]) -> Batch:
    return Batch(*(np.stack(arrays) for arrays in zip(*windows, strict=True)))
