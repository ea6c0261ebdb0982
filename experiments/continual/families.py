"""Sequences of tasks: images under permutations, images and intents by class, texts one after the other."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer

from nested_jax.errors import UserError
from nested_jax.typing import Array, Int

INPUTS = 1024  # of an intent: words and pairs of words, hashed
PIECE, JUDGED = 257, 64  # bytes of an example of a text; such examples that are held out, and tested


class Family(NamedTuple):
    """Examples (classes, n, inputs) by class, and how they make tasks; every method sees every example `epochs` times.

    permuted: every task has all classes, under a permutation of the inputs of its own; else it has `classes` more of them,
    of an order that the seed draws. Of texts a class is a text, and an example T + 1 bytes of it.
    """

    train: np.ndarray
    heldout: np.ndarray
    test: np.ndarray
    tasks: int
    permuted: bool = False
    epochs: int = 1
    batch_size: int = 32
    rates: float = 1.0
    """What the learning rates of methods are multiplied by."""

    @property
    def texts(self) -> bool:
        """Whether examples are bytes, which are predicted."""
        return not np.issubdtype(self.train.dtype, np.floating)

    @property
    def classes(self) -> int:
        """Classes of a task."""
        return len(self.train) // (1 if self.permuted else self.tasks)

    @property
    def total(self) -> int:
        """Classes of all tasks together."""
        return self.classes * (1 if self.permuted else self.tasks)


def draw(family: Family, key: Array, task: Int[Array, ""], examples: Array) -> tuple[Array, Int[Array, " N"]]:
    """The examples of a task, and the class of each among all of the sequence, in the order in which they are first met.

    Args:
        family: of the tasks.
        key: of the sequence.
        task: its index.
        examples: (classes, n, inputs), one of the family's three parts.

    Returns:
        (examples (N, inputs), classes (N,)).
    """
    _, n, inputs = examples.shape
    if family.permuted:
        x = examples.reshape(-1, inputs)[:, jax.random.permutation(jax.random.fold_in(key, task), inputs)]
        return x, jnp.repeat(jnp.arange(len(examples)), n)
    first = task * family.classes
    chosen = jax.lax.dynamic_slice_in_dim(jax.random.permutation(key, len(examples)), first, family.classes)
    return examples[chosen].reshape(-1, inputs), first + jnp.repeat(jnp.arange(family.classes), n)


def load(name: str, folder: Path, most: int) -> Family:
    """A family by its name.

    Args:
        name: of `config.FAMILIES`.
        folder: of the data.
        most: examples of a class to train on.

    Raises:
        UserError: a file is missing or is not what it should be.
    """
    if name == "permuted images":
        return Family(*_images(folder, most), tasks=10, permuted=True)
    if name == "split images":
        return Family(*_images(folder, most), tasks=5)
    if name == "intents":
        return Family(*_clinc(folder, most), tasks=10, epochs=10)
    if name == "banking intents":
        return Family(*_banking(folder, most), tasks=7, epochs=10)
    texts = _texts(folder / name, most)
    return Family(*texts, tasks=len(texts[0]), batch_size=8, rates=10.0)


def _images(folder: Path, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fashion-MNIST, as its authors publish it: pixels of mean 0 and variance 1; 100 of a class held out and tested."""
    parts = {}
    for part in ("train", "t10k"):
        x = _read(folder / f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28 * 28)
        parts[part] = _by_class(x.astype(np.float32), _read(folder / f"{part}-labels-idx1-ubyte.gz", 8))
    train, mean, std = parts["train"], parts["train"].mean(), parts["train"].std()
    return tuple((x - mean) / std for x in (train[:, :-100][:, :most], train[:, -100:], parts["t10k"][:, :100]))


def _read(path: Path, header: int) -> np.ndarray:
    try:
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)
    except (OSError, EOFError, ValueError) as error:
        what = "get it from github.com/zalandoresearch/fashion-mnist, data/fashion"
        raise UserError(f"{path} cannot be read, {error}: {what}") from None


def _clinc(folder: Path, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    path = folder / "clinc150.json"
    try:
        parts = json.loads(path.read_text())
        return _hashed(*(parts[part] for part in ("train", "val", "test")), most)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read, {error!r}: get data_full.json from github.com/clinc/oos-eval") from None


def _banking(folder: Path, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    try:
        train, test = (
            [tuple(row) for row in csv.reader((folder / f"banking77_{part}.csv").open())][1:] for part in ("train", "test")
        )
        held = Counter[str]()
        parts = [[], []]
        for row in reversed(train):  # the last ten of each class
            held[row[1]] += 1
            parts[held[row[1]] > 10].append(row)
        return _hashed(parts[1], parts[0], test, most)
    except (OSError, ValueError, IndexError) as error:
        what = "get it from github.com/PolyAI-LDN/task-specific-datasets, banking_data"
        raise UserError(f"{folder}/banking77_*.csv cannot be read, {error!r}: {what}") from None


def _hashed(train: list, heldout: list, test: list, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words and pairs of words, hashed, of unit norm times the root of their number."""
    hashed = HashingVectorizer(n_features=INPUTS, ngram_range=(1, 2))
    names = sorted({name for _, name in train})
    encode = lambda rows: (INPUTS**0.5 * hashed.transform([text for text, _ in rows]).toarray().astype(np.float32),
                           np.array([names.index(name) for _, name in rows]))  # fmt: skip
    train_, heldout_, test_ = (_by_class(*encode(rows)) for rows in (train, heldout, test))
    return train_[:, :most], heldout_, test_


def _texts(folder: Path, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of the files of a folder, in the order of their places: first those that are held out and tested."""
    files = sorted(folder.glob("*.txt"))
    if len(files) < 2:
        raise UserError(f"{folder} has {len(files)} files NAME.txt: give two or more, as texts.py writes them")
    texts = [np.frombuffer(path.read_bytes(), np.uint8) for path in files]
    need = PIECE * (2 * JUDGED + most)
    for path, text in zip(files, texts, strict=True):
        if len(text) < need:
            raise UserError(f"{path} has {len(text)} bytes: give {need} or more, or fewer --examples")
    pieces = np.stack([text[:need].reshape(-1, PIECE) for text in texts]).astype(np.int32)
    return pieces[:, 2 * JUDGED :], pieces[:, :JUDGED], pieces[:, JUDGED : 2 * JUDGED]


def _by_class(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(classes, n, inputs), n of the smallest class; a larger one loses its last examples."""
    least = np.bincount(y).min()
    return np.stack([x[y == label][:least] for label in range(y.max() + 1)])
