"""Text as a sequence of documents: the standard library, a local file or folder, or a TFDS dataset.

Local text is read into memory; only a TFDS name imports TFDS. `open_documents` opens all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from nested_jax.errors import UserError

_HELDOUT = 0.05  # share of the files, or of the documents of a file, that is held out
_FEW = 20  # fewer files than this are cut into documents, so that a twentieth can be held out
_DOCUMENT = 2**14  # bytes of a document cut from a file
_LONGEST = 2**24  # bytes beyond which any file is cut
_HELDOUT_SPLITS = ("heldout", "validation", "valid", "test")
_NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data")
_HELP = 'give "stdlib", the path of a text folder or file, or a TFDS dataset name, optionally name:feature'


def open_documents(
    source: str | os.PathLike[str], split: str = "train", *, data_dir: str | os.PathLike[str] | None = None
) -> Sequence[bytes]:
    """The documents of a text source, by index.

    Files of local text are split by a hash of their names: about a twentieth is held out, and a new file moves no other
    one. Fewer than 20 files are cut into documents of about 16 KiB at blank lines, and documents instead of files are held
    out. The order of the documents is a shuffle that depends on their names alone. Local text stays in memory.

    Args:
        source: "stdlib" (the running Python's standard library: its help topics, which are prose, and its modules), an
            existing file or folder of UTF-8 text (of a folder every such file, but hidden and repeated ones), the folder of
            a TFDS dataset already prepared, or a TFDS name such as "lm1b", "wiki40b/en" or "pg19:book_text" (the feature
            `text`, else the first Text feature by name, unless one is given).
        split: "train" or "heldout". Of a TFDS dataset, "heldout" is its split heldout, validation or test, else the last
            twentieth of train.
        data_dir: the folder where TFDS prepares datasets; None: TFDS's own.

    Returns:
        The bytes of each document's UTF-8 text.

    Raises:
        UserError: the source is missing, unreadable or no text.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "poem.txt").write_text("Tyger Tyger, burning bright,\\n" * 40)
    ...     open_documents(folder)[0][:11]
    b'Tyger Tyger'
    """
    source = os.fspath(source)
    if split not in ("train", "heldout"):
        raise UserError(f'split {split!r} is unknown: give "train" or "heldout"')
    path = Path(os.path.expanduser(source))
    if source == "stdlib" or (source and path.exists() and not (path / "dataset_info.json").exists()):
        return _local_documents(source if source == "stdlib" else path.absolute(), split)
    return _tfds_documents(source, split, data_dir)


# Local text


def _local_documents(source: str | Path, split: str) -> list[bytes]:
    try:
        files = list(_files(source))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; give a source that can be read") from error
    total = sum(len(text) for _, text in files)
    if total < 64:
        raise UserError(f"{source} holds {total} bytes of UTF-8 text: {_HELP}")
    by_file = len(files) >= _FEW
    size = _LONGEST if by_file else min(_DOCUMENT, max(1024, int(_HELDOUT * total)), total // 2)
    documents = []  # (what is held out or not as a whole, the document's name, its text)
    for name, text in files:
        pieces = _cut(text, size)
        names = [f"{name}#{i}" for i in range(len(pieces))] if len(pieces) > 1 else [name]
        documents += [(name if by_file else own, own, piece) for own, piece in zip(names, pieces, strict=True)]
    heldout = _hold_out({unit for unit, _, _ in documents})
    chosen = [(name, text) for unit, name, text in documents if (unit in heldout) == (split == "heldout")]
    chosen.sort(key=lambda document: hashlib.md5((split + document[0]).encode()).digest())  # the order of TFDS
    return [text for _, text in chosen]


def _hold_out(units: Iterable[str]) -> set[str]:
    """About a twentieth of the units, at least one and not all, by hash."""
    ranked = sorted(units, key=_hash)
    return {unit for i, unit in enumerate(ranked) if i == 0 or (i < len(ranked) - 1 and _hash(unit) < _HELDOUT)}


def _hash(name: str) -> float:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64


def _cut(text: bytes, size: int) -> list[bytes]:
    """Pieces of at most `size` bytes, cut at a blank line, else a line's end, else a space, else between characters."""
    pieces, start = [], 0
    while len(text) - start > size:
        window = text[start : start + size]
        ends = (window.rfind(mark) + len(mark) for mark in (b"\n\n", b"\n", b" "))
        end = next((end for end in ends if end > size // 2), size)
        while 0 < end < len(text) - start and text[start + end] & 0xC0 == 0x80:
            end -= 1
        pieces.append(text[start : start + (end or size)])
        start += end or size
    return [*pieces, text[start:]]


def _files(source: str | Path) -> Iterator[tuple[str, bytes]]:
    """(name, text) of the files of a source in a fixed order; of equal files, which may be split apart, the first."""
    seen = set()
    for name, text in _standard_library() if source == "stdlib" else _path(Path(source)):
        if (digest := hashlib.blake2b(text).digest()) not in seen:
            seen.add(digest)
            yield name, text


def _path(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        yield from _folder(path)
    elif path.is_file():
        text = path.read_bytes()
        if text.strip() and not _is_text(text):
            raise UserError(f"{path} is binary: it holds NUL bytes or is not UTF-8; give UTF-8 text")
        yield path.name, text if text.strip() else b""
    else:
        raise UserError(f"{path} is neither a file nor a folder: {_HELP}")


def _folder(root: Path, suffix: str = "", without: Sequence[str] = ()) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder that is UTF-8 text, except hidden files, prepared TFDS datasets and run folders."""

    def fail(error: OSError):
        raise error

    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = sorted(f for f in folders if f not in without and not f.startswith((".", "__pycache__")))
        if "checkpoints" in folders and {"config.json", "metrics.jsonl"} <= set(files):
            folders[:], files = [], []
        for file in sorted(files) if "dataset_info.json" not in files else ():
            path = Path(folder, file)
            if file.startswith(".") or not file.endswith(suffix) or not path.is_file():
                continue
            text = path.read_bytes()
            if text.strip() and _is_text(text):
                yield os.fsencode(path.relative_to(root)).decode(errors="backslashreplace"), text


def _standard_library() -> Iterator[tuple[str, bytes]]:
    with contextlib.suppress(ImportError):
        topics = importlib.import_module("pydoc_data.topics").topics
        yield from ((f"topics/{topic}", text.encode()) for topic, text in sorted(topics.items()))
    yield from _folder(Path(sysconfig.get_path("stdlib")), ".py", _NOT_LIBRARY)


def _is_text(data: bytes) -> bool:
    try:
        return b"\0" not in data and data.decode() is not None
    except UnicodeDecodeError:
        return False


# TFDS by name


class _Texts(Sequence[bytes]):
    """One text feature of the examples of a TFDS data source, read when indexed."""

    def __init__(self, examples: Sequence[dict[str, Any]], feature: str, indices: range):
        self._examples, self._feature, self._indices = examples, feature, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> _Texts: ...
    def __getitem__(self, index: int | slice) -> bytes | _Texts:
        if isinstance(index, slice):
            return _Texts(self._examples, self._feature, self._indices[index])
        return self._examples[self._indices[index]][self._feature]


def _tfds_documents(source: str, split: str, data_dir: str | os.PathLike[str] | None) -> Sequence[bytes]:
    builder, feature = _tfds_builder(source, data_dir)
    splits = list(builder.info.splits)
    train = "train" if "train" in splits else splits[0]
    heldout = next((name for name in _HELDOUT_SPLITS if name in splits and name != train), None)
    examples = builder.as_data_source(heldout if split == "heldout" and heldout else train)
    documents = _Texts(examples, feature, range(len(examples)))
    if len(documents) < _FEW:
        documents = [piece for text in documents for piece in _cut(text, _DOCUMENT)]
    if heldout is None:
        first = len(documents) - max(1, int(_HELDOUT * len(documents)))
        documents = documents[:first] if split == "train" else documents[first:]
    if len(documents) == 0:
        raise UserError(f"TFDS dataset {source} has no documents to {split} on: choose another one")
    return documents


def _tfds_builder(source: str, data_dir: str | os.PathLike[str] | None) -> tuple[Any, str]:
    """The builder of a TFDS dataset, prepared, and the name of its text feature."""
    import tensorflow_datasets as tfds

    name, _, feature = source.rpartition(":")
    if not name or re.fullmatch(r"[\d.*]+", feature):  # a version
        name, feature = source, ""
    path = Path(os.path.expanduser(name))
    try:
        if prepared := bool(name) and path.exists():
            builder: Any = tfds.builder_from_directory(path)
        elif re.split("[/:]", name)[0] in _tfds_names():
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        elif "/" in name or "." in name:
            raise UserError(f"path {source} does not exist: {_HELP}")
        else:
            raise UserError(f"dataset {source or repr(source)} is unknown: {_HELP}")
        texts = sorted(key for key, value in builder.info.features.items() if isinstance(value, tfds.features.Text))
        if not texts or (feature and feature not in texts):
            known = ", ".join(texts) or "no text at all"
            raise UserError(f"TFDS dataset {source} has no such feature: it has {known}; give name:feature")
        if not prepared:
            builder.download_and_prepare(file_format="array_record")
        builder.as_data_source(list(builder.info.splits)[0])
    except UserError:
        raise
    except Exception as error:  # whatever a dataset's own code or the network raises
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        remedy = "install what it needs, or give a data_dir where it is prepared as array_record"
        raise UserError(f"TFDS dataset {source} cannot be read: {reason}; {remedy}") from error
    return builder, feature or ("text" if "text" in texts else texts[0])


def _tfds_names() -> list[str]:
    import tensorflow_datasets as tfds

    for group in ("text", "summarization", "translate", "structured"):  # registered on import only
        importlib.import_module(f"tensorflow_datasets.{group}")
    return tfds.list_builders(with_community_datasets=False)
