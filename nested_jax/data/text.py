"""Text as a sequence of documents: the standard library, a local file or folder, or a TFDS dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import overload

from nested_jax.data.datasets import tfds_documents
from nested_jax.data.local import local_documents
from nested_jax.data.summary import Summary
from nested_jax.errors import UserError


class Documents(Sequence[bytes]):
    """The documents of a split, by index, and the `summary` of their source."""

    def __init__(self, documents: Sequence[bytes], summary: Summary):
        self._documents, self.summary = documents, summary

    def __len__(self) -> int:
        return len(self._documents)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        return self._documents[index]


def open_documents(
    source: str | os.PathLike[str], split: str = "train", *, data_dir: str | os.PathLike[str] | None = None
) -> Documents:
    """The documents of a text source, by index.

    Files of local text are split by a hash of their names: about a twentieth is held out, and a new file moves no other
    one. Fewer than 20 documents are cut into pieces of about 16 KiB at blank lines, and pieces are held out instead. The
    order of the documents is a shuffle that depends on their names below the source alone, so that the same text by another
    path is the same documents. Local text stays in memory.

    Each line of a .jsonl or .ndjson file is a document: an object whose field "text" is read, or the field that follows a
    colon, as in "papers.jsonl:abstract". Files that end in .gz are unpacked, up to 1 GiB each. A byte-order mark is no text.

    Args:
        source: "stdlib" (the running Python's standard library: its help topics, which are prose, and its modules), an
            existing file or folder of UTF-8 text (of a folder every such file, but hidden and repeated ones), the folder of
            a TFDS dataset already prepared, or a TFDS name such as "lm1b", "wiki40b/en" or "pg19:book_text" (the feature
            `text`, else the first Text feature by name, unless one is given).
        split: "train" or "heldout". Of a TFDS dataset, "heldout" is its split heldout, validation or test, else the last
            twentieth of train.
        data_dir: the folder where TFDS prepares datasets; None: TFDS's own.

    Returns:
        The bytes of each document's UTF-8 text, with a `summary` of what was read and what was left out.

    Raises:
        UserError: the source is missing, unreadable or no text, or a .gz file holds more.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "poem.txt").write_text("Tyger Tyger, burning bright,\\n" * 40)
    ...     Path(folder, ".hidden").touch()
    ...     documents = open_documents(folder)
    >>> documents[0][:11], str(documents.summary)
    (b'Tyger Tyger', '1 file, 1,160 bytes, 2 documents, 1 of them held out; left out: 1 hidden (.hidden)')
    """
    source = os.fspath(source)
    if split not in ("train", "heldout"):
        raise UserError(f'split {split!r} is unknown: give "train" or "heldout"')
    if source == "stdlib":
        return Documents(*local_documents(source, split, ""))
    whole, _, ending = source.rpartition(":")
    for name, field in ((source, ""), (whole, ending)):  # a path may have a colon in it
        path = Path(os.path.expanduser(name))
        if name and path.exists() and not (path / "dataset_info.json").exists():
            return Documents(*local_documents(path.absolute(), split, field))
    return Documents(*tfds_documents(source, split, data_dir))
