"""The run folder: its config, the fingerprint of its text, and its lock."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from nested_jax.errors import UserError
from nested_jax.train.checkpoint import CHECKPOINTS
from nested_jax.train.config import TrainConfig, difference

_CONFIG, _LOCK = "config.json", ".lock"
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
        saved = json.loads((folder / _CONFIG).read_text())
        return TrainConfig.from_json(saved["train"])
    except FileNotFoundError:
        raise UserError(f"{folder} holds files and no run (no {_CONFIG}): give another --run-dir") from None
    except NotADirectoryError:
        raise UserError(f"--run-dir {folder} is not a folder: give another --run-dir") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / _CONFIG} is damaged or of another version ({error}): give {_REMEDY}") from error


def write_config(folder: Path, config: TrainConfig, text: str) -> None:
    """Writes config.json, by renaming a complete file.

    Args:
        folder: the run folder.
        config: of the run.
        text: the fingerprint of its documents.
    """
    part = folder / f"{_CONFIG}.part"
    values = {"train": config.to_json(), "text": text}
    part.write_text(json.dumps(values, indent=2, default=lambda number: number.item()) + "\n")
    part.rename(folder / _CONFIG)


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


def assert_same_text(folder: Path, text: str) -> None:
    """Raises UserError where the run in a folder was made with documents of another fingerprint."""
    if json.loads((folder / _CONFIG).read_text()).get("text") != text:
        raise UserError(f"the text of --data has changed since the run in {folder} was made: give {_REMEDY}")


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


def stamp(folder: Path) -> tuple[bytes, list[str]]:
    """The config and the steps of the checkpoints: another value means that another process has trained in the folder."""
    config, checkpoints = folder / _CONFIG, folder / CHECKPOINTS
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return config.read_bytes() if config.is_file() else b"", sorted(filter(str.isdigit, names))


def set_aside(folder: Path) -> Path | None:
    """Renames the folder of a run to the first of FOLDER.1, FOLDER.2, ... that is free.

    Args:
        folder: the run folder.

    Returns:
        The new path; None where there is no folder, or an empty one.

    Raises:
        UserError: the folder contains something else, or is in use.
    """
    if not folder.exists() or (folder.is_dir() and {file.name for file in folder.iterdir()} <= _LEFTOVERS):
        return None
    if not (folder / _CONFIG).is_file():
        raise UserError(f"--run-dir {folder} holds no run (no {_CONFIG}) to start over: give another --run-dir")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"--run-dir {folder} holds the working directory, which --fresh cannot rename: run from elsewhere")
    with lock(folder):
        aside = next(p for n in range(1, 10**6) if not (p := folder.with_name(f"{folder.name}.{n}")).exists())
        return folder.rename(aside)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """A context in which no other process trains in a folder, which is made where it is missing.

    Raises:
        UserError: the folder is locked, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("w")
    except OSError as error:
        raise UserError(f"--run-dir {folder} cannot be written to: {error.strerror}; give another --run-dir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is training in {folder}: wait for it or give another --run-dir") from None
        yield
