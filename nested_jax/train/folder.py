"""The run folder: its config, the fingerprint of its text, and its lock."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from nested_jax.errors import UserError
from nested_jax.files import read_file, write_file
from nested_jax.train.config import TrainConfig, difference

_CONFIG, _LOCK = "config.json", ".lock"
_LARGEST_CONFIG = 2**20  # bytes
_LEFTOVERS = {_LOCK, f"{_CONFIG}.part"}  # files that a process stopped early may leave
_REMEDY = "another --run-dir, or start over with nested-jax train --fresh, which keeps the old run under another name"


def read_config(folder: Path) -> TrainConfig | None:
    """The config of the run in a folder.

    Args:
        folder: a run folder, or a path where none is yet.

    Returns:
        The config; None where there is no folder, or an empty one.

    Raises:
        UserError: the folder contains something else, or its config is damaged.
    """
    if not folder.exists() or (folder.is_dir() and {file.name for file in folder.iterdir()} <= _LEFTOVERS):
        return None
    try:
        data = read_file(folder / _CONFIG, _LARGEST_CONFIG, within=folder)
    except FileNotFoundError:
        raise UserError(f"{folder} holds files and no run (no {_CONFIG}): give another --run-dir") from None
    except NotADirectoryError:
        raise UserError(f"--run-dir {folder} is not a folder: give another --run-dir") from None
    try:
        return TrainConfig.from_json(json.loads(data)["train"])
    except (KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
        reason = f"{error}"[:200]
        raise UserError(f"{folder / _CONFIG} is damaged or of another version ({reason}): give {_REMEDY}") from error


def holds_run(folder: Path) -> bool:
    """Whether there is a config in the folder: then its lock is taken before anything of it is read."""
    return os.path.lexists(folder / _CONFIG)


def write_config(folder: Path, config: TrainConfig, text: str) -> None:
    """Writes config.json, by renaming a complete file.

    Args:
        folder: the run folder.
        config: of the run.
        text: the fingerprint of its data.
    """
    values = {"train": config.to_json(), "text": text}
    write_file(folder / _CONFIG, (json.dumps(values, indent=2, default=lambda number: number.item()) + "\n").encode())


def resumable(folder: Path, given: TrainConfig) -> TrainConfig | None:
    """The config of the run in a folder that another config resumes.

    Args:
        folder: the run folder.
        given: the other config.

    Returns:
        The saved config; None where there is no run, or `given.fresh`.

    Raises:
        UserError: a field of the config makes it another run, which is named.
    """
    if given.fresh:
        return None
    saved = read_config(folder)
    if saved and (found := difference(saved, given)):
        name, theirs, ours = found
        remedy = f"{name} {theirs} or more, {_REMEDY}" if name == "--steps" else _REMEDY
        raise UserError(f"{folder} holds a run with {name} {theirs}, not {ours}: give {remedy}")
    return saved


def assert_same_data(folder: Path, data: str, name: str) -> None:
    """Raises UserError, which names the data, where the run in a folder was made with data of another fingerprint."""
    if json.loads(read_file(folder / _CONFIG, _LARGEST_CONFIG, within=folder)).get("text") != data:
        raise UserError(f"{name} has changed since the run in {folder} was made, or is another: give {_REMEDY}")


def fingerprint(*splits: Sequence[bytes], most: int = 10_000) -> str:
    """A digest of documents.

    Args:
        *splits: sequences of documents.
        most: documents of a split that are read, evenly spaced; of all of them the number counts.

    Returns:
        16 hexadecimal digits.

    >>> fingerprint([b"abc"], [b"d"]) == fingerprint([b"abc"], [b"e"])
    False
    """
    digest = hashlib.blake2b(digest_size=8)
    for documents in splits:
        length = len(documents)
        digest.update(f"{length}\0".encode())
        for i in range(min(length, most)):
            document = documents[i * length // min(length, most)]
            digest.update(f"{len(document)}\0".encode() + document)
    return digest.hexdigest()


def set_aside(folder: Path) -> Path | None:
    """Renames the folder of a run to the first of FOLDER.1, FOLDER.2, ... that is free.

    Args:
        folder: the run folder; this process has its lock.

    Returns:
        The new path; None where there is no folder, or an empty one.

    Raises:
        UserError: the folder contains something else, or the working directory.
    """
    if not folder.exists() or (folder.is_dir() and {file.name for file in folder.iterdir()} <= _LEFTOVERS):
        return None
    if not (folder / _CONFIG).is_file():
        raise UserError(f"--run-dir {folder} holds no run (no {_CONFIG}) to start over: give another --run-dir")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"--run-dir {folder} holds the working directory, which --fresh cannot rename: run from elsewhere")
    return folder.rename(next(p for n in range(1, 10**6) if not (p := folder.with_name(f"{folder.name}.{n}")).exists()))


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """A context in which no other process trains in a folder, which is made where it is missing.

    Raises:
        UserError: the folder is locked, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = open(os.open(folder / _LOCK, flags, 0o666), "r+b", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--run-dir {folder} cannot be written to: {error.strerror}; give another --run-dir") from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"{folder / _LOCK} is no file: remove it, or give another --run-dir")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is training in {folder}: wait for it or give another --run-dir") from None
        yield
