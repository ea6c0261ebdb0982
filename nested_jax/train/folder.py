"""The run folder: whose it is, what it was made with, and who is writing to it."""

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
_NOTHING = {_LOCK, f"{_CONFIG}.part"}  # what a start that did not get far may leave
_REMEDY = "give --fresh to start over (the old run is kept under another name) or another --run-dir"


def read_config(folder: Path) -> TrainConfig | None:
    """The config that a folder's run was made with; None where there is no folder, or an empty one.

    Raises UserError for a folder that holds something else.
    """
    if not folder.exists() or (folder.is_dir() and {file.name for file in folder.iterdir()} <= _NOTHING):
        return None
    try:
        saved = json.loads((folder / _CONFIG).read_text())
        config = TrainConfig.from_json(saved["train"])
        config.check()
        return config
    except FileNotFoundError:
        raise UserError(f"{folder} holds files and no run (no {_CONFIG}): give another --run-dir") from None
    except NotADirectoryError:
        raise UserError(f"--run-dir {folder} is not a folder: give another --run-dir") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / _CONFIG} is damaged or of another version ({error}): {_REMEDY}") from error


def write_config(folder: Path, config: TrainConfig, text: str) -> None:
    """Writes config.json, whole or not at all; `text` is the fingerprint of the documents."""
    part = folder / f"{_CONFIG}.part"
    part.write_text(json.dumps({"train": config.to_json(), "text": text}, indent=2) + "\n")
    part.rename(folder / _CONFIG)


def begun(folder: Path, given: TrainConfig) -> bool:
    """Whether the folder holds a run that the given config goes on with.

    Raises UserError naming the first field that makes it another run.
    """
    if given.fresh:
        return False
    saved = read_config(folder)
    if saved and (found := difference(saved, given)):
        name, theirs, ours = found
        remedy = f"give {name} {theirs} or more, or {_REMEDY}" if name == "--steps" else _REMEDY
        raise UserError(f"{folder} holds a run with {name} {theirs}, not {ours}: {remedy}")
    return saved is not None


def assert_same_text(folder: Path, text: str) -> None:
    """Raises UserError where the folder's run read other documents."""
    if json.loads((folder / _CONFIG).read_text()).get("text") != text:
        raise UserError(f"the text of --data has changed since the run in {folder} was made: {_REMEDY}")


def fingerprint(*splits: Sequence[bytes], most: int = 10_000) -> str:
    """A digest of how many documents each split has, and of all of them, or of `most` spread over a split that has more.

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
    """What tells whether another process has trained in the folder: its config, and the steps of its checkpoints."""
    config, checkpoints = folder / _CONFIG, folder / CHECKPOINTS
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return config.read_bytes() if config.is_file() else b"", sorted(filter(str.isdigit, names))


def set_aside(folder: Path) -> Path | None:
    """Renames the folder of a run to the first of FOLDER.1, FOLDER.2, ... that is free; where it went, if it was there.

    Raises UserError for a folder that holds something else, or is in use.
    """
    if not folder.exists() or (folder.is_dir() and {file.name for file in folder.iterdir()} <= _NOTHING):
        return None
    if not (folder / _CONFIG).is_file():
        raise UserError(f"--run-dir {folder} holds no run (no {_CONFIG}) to start over: give another --run-dir")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"--run-dir {folder} holds the working directory, which --fresh cannot rename: run from elsewhere")
    with claim(folder):
        aside = next(p for n in range(1, 10**6) if not (p := folder.with_name(f"{folder.name}.{n}")).exists())
        return folder.rename(aside)


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from writing to it. Raises UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("w")
    except OSError as error:
        raise UserError(f"--run-dir {folder} cannot be written to: {error.strerror}; give another --run-dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is training in {folder}: wait for it or give another --run-dir") from None
        yield
