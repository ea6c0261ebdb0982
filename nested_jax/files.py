"""Reading and writing single files: at once, of bounded size, through no link out of their folder."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from nested_jax.errors import UserError


def read_file(path: str | os.PathLike[str], most: int, *, within: Path | None = None) -> bytes:
    """The bytes of a regular file. A pipe or a device is refused, not waited for.

    Args:
        path: the file.
        most: bytes that it may hold.
        within: a folder that links must not lead out of; None: links may lead anywhere.

    Raises:
        UserError: the path is no regular file, leads out of the folder, or is larger.
        OSError: there is no such file, or it cannot be read.
    """
    with open_file(path, within=within) as file:
        if os.fstat(file.fileno()).st_size > most or len(data := file.read(most + 1)) > most:
            raise UserError(f"{path} is larger than {most:,} bytes: give another file")
    return data


def open_file(path: str | os.PathLike[str], *, within: Path | None = None) -> BufferedReader:
    """A regular file, open to be read. Raises as `read_file`, but for its size."""
    _assert_regular(path, os.stat(path))  # before it is opened, which a device may answer
    if within is not None and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(within)):
        raise UserError(f"{path} is a link out of {within}: put the file itself there")
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    try:
        _assert_regular(path, os.fstat(file.fileno()))  # of what was opened, should the path have changed
    except BaseException:
        file.close()
        raise
    return file


def write_file(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Writes a file by renaming a complete one, so that a stopped process leaves no part of it.

    Args:
        path: the file.
        data: its bytes.
        mode: its rights, less the process's mask.
    """
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)  # a link there is not followed
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
        file.write(data)
    part.rename(path)


def _assert_regular(path: str | os.PathLike[str], status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise UserError(f"{path} is {kinds.get(stat.S_IFMT(status.st_mode), 'a device')}, not a file: give another one")
