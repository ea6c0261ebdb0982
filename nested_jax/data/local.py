"""Local text, read into memory: the standard library, a file, or a folder of files, plain, packed or in JSON Lines."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import importlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nested_jax.data.summary import Summary, reasons
from nested_jax.errors import UserError

HELDOUT = 0.05  # share of the documents, or of the pieces of a few documents, that is held out
FEW = 20  # fewer documents than this are cut into pieces, so that a twentieth can be held out
PIECE = 2**14  # bytes of such a piece
_LONGEST = 2**24  # bytes beyond which any document is cut
_MOST = 2**30  # bytes that a .gz file may hold: a small file can unpack to more than any memory
_NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data")
_LINES = (".jsonl", ".ndjson")
HELP = 'give "stdlib", the path of a text folder or file, or a TFDS dataset name, optionally name:feature'


def local_documents(source: str | Path, split: str, field: str) -> tuple[list[bytes], Summary]:
    """The documents of a split of "stdlib", a file or a folder, and what the source holds, see `open_documents`."""
    left_out: dict[str, list[str]] = {}
    try:
        files = list(_files(source, field, left_out))
    except OSError as error:
        raise UserError(f"{error.filename or source}: {error.strerror}; give a source that can be read") from error
    whole = [document for file in files for document in file]  # (name, text)
    total = sum(len(text) for _, text in whole)
    if total < 64:
        but = f" (left out: {reasons(left_out)})" if left_out and Path(source).is_dir() else ""
        raise UserError(f"{source} holds {total} bytes of UTF-8 text{but}: {HELP}")
    enough = len(whole) >= FEW
    size = _LONGEST if enough else min(PIECE, max(1024, int(HELDOUT * total)), total // 2)
    documents = []  # (what is held out or not as a whole, the document's name, its text)
    for name, text in whole:
        pieces = cut(text, size)
        names = [f"{name}#{i}" for i in range(len(pieces))] if len(pieces) > 1 else [name]
        documents += [(name if enough else own, own, piece) for own, piece in zip(names, pieces, strict=True)]
    heldout = _hold_out({unit for unit, _, _ in documents})
    chosen = [(name, text) for unit, name, text in documents if (unit in heldout) == (split == "heldout")]
    chosen.sort(key=lambda document: hashlib.md5((split + document[0]).encode()).digest())  # the order of TFDS
    held = len(chosen) if split == "heldout" else len(documents) - len(chosen)
    return [text for _, text in chosen], Summary(len(files), total, len(documents), held, left_out)


def _hold_out(units: Iterable[str]) -> set[str]:
    """About a twentieth of the units, at least one and not all, by hash."""
    ranked = sorted(units, key=_hash)
    return {unit for i, unit in enumerate(ranked) if i == 0 or (i < len(ranked) - 1 and _hash(unit) < HELDOUT)}


def _hash(name: str) -> float:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64


def cut(text: bytes, size: int) -> list[bytes]:
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


def _files(source: str | Path, field: str, left_out: dict[str, list[str]]) -> Iterator[list[tuple[str, bytes]]]:
    """The documents, as (name, text), of each file of a source in a fixed order; of equal ones, which may be split apart,
    the first. What is left out is noted by its reason."""
    seen = set()

    def new(documents: list[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        for name, text in documents:
            if not text.strip():
                left_out.setdefault("empty", []).append(name)
            elif (digest := hashlib.blake2b(text).digest()) in seen:
                left_out.setdefault("repeated", []).append(name)
            else:
                seen.add(digest)
                yield name, text

    named = _standard_library() if source == "stdlib" else _path(Path(source), field, left_out)
    yield from (kept for documents in named if (kept := list(new(documents))))


def _path(path: Path, field: str, left_out: dict[str, list[str]]) -> Iterator[list[tuple[str, bytes]]]:
    if path.is_dir():
        for name, file in _folder(path, left_out):
            try:
                yield _read(file, name, field)
            except _NoText as error:
                left_out.setdefault(str(error).split(":")[0], []).append(name)
    elif path.is_file():
        try:
            yield _read(path, "", field)  # the same documents by any name
        except _NoText as error:
            reason, _, remedy = str(error).partition(":")
            raise UserError(f"{path} is {reason}:{remedy or ' give UTF-8 text'}") from None
    else:
        raise UserError(f"{path} is neither a file nor a folder: {HELP}")


class _NoText(Exception):
    """A file holds no text: the reason, and after a colon what more there is to say."""


def _read(path: Path, name: str, field: str = "") -> list[tuple[str, bytes]]:
    """The documents, as (name, text), of a file. Raises _NoText where it holds no text."""
    if path.suffix == ".gz":
        name, data = name.removesuffix(".gz"), _unpacked(path)
    else:
        data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _NoText("UTF-16: write it in UTF-8")
    text = data.removeprefix(codecs.BOM_UTF8)
    if text.strip() and not _is_text(text):
        raise _NoText("binary: it holds NUL bytes or is not UTF-8; give UTF-8 text")
    if Path(path.name.removesuffix(".gz")).suffix in _LINES:
        return [(f"{name}#{i}", text) for i, text in enumerate(_lines(text, field or "text"))]
    if field:
        raise _NoText(f"no JSON Lines: only .jsonl and .ndjson files have a field {field!r}")
    return [(name, text)]


def _unpacked(path: Path) -> bytes:
    """What a .gz file holds, read in blocks: one that holds too much is refused before all of it is in memory."""
    data = bytearray()
    with path.open("rb") as packed, gzip.open(packed) as file:
        try:
            while block := file.read(2**20):
                data += block
                if len(data) > _MOST:
                    raise UserError(f"{path} unpacks to more than {_MOST:,} bytes: unpack it, or split it in smaller files")
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise _NoText("damaged .gz") from None
    return bytes(data)


def _lines(text: bytes, field: str) -> Iterator[bytes]:
    """The field of each line of JSON."""
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            raise _NoText(f"damaged: line {number} is no JSON") from None
        document = document if isinstance(document, dict) else {}
        if not isinstance(document.get(field), str):
            texts = [name for name, value in document.items() if isinstance(value, str)]
            known = f"it has {', '.join(texts)}; give FILE:FIELD" if texts else "it has no text"
            raise _NoText(f"without a field {field!r}: in line {number}, {known}")
        yield document[field].encode(errors="replace")


def _folder(
    root: Path, left_out: dict[str, list[str]], suffix: str = "", without: Sequence[str] = ()
) -> Iterator[tuple[str, Path]]:
    """(name, path) of every file below a folder, except hidden ones, prepared TFDS datasets and run folders."""

    def fail(error: OSError):
        raise error

    def leave_out(reason: str, path: Path):
        left_out.setdefault(reason, []).append(_name(path, root))

    for folder, folders, files in os.walk(root, onerror=fail):
        here = Path(folder)
        for hidden in [name for name in sorted(folders + files) if name.startswith(".")]:
            leave_out("hidden", here / hidden)
        folders[:] = sorted(f for f in folders if f not in without and not f.startswith((".", "__pycache__")))
        for what, found in (
            ("run folder", "checkpoints" in folders and {"config.json", "metrics.jsonl"} <= set(files)),
            ("prepared TFDS dataset", "dataset_info.json" in files),
        ):
            if found:
                leave_out(what, here)
                folders[:], files = [], []
        for file in sorted(files):
            path = here / file
            if file.startswith(".") or not file.endswith(suffix):
                continue
            if path.is_file():
                yield _name(path, root), path
            else:
                leave_out("no file", path)  # a pipe, a device, or a link to nothing


def _name(path: Path, root: Path) -> str:
    return os.fsencode(path.relative_to(root)).decode(errors="backslashreplace")


def _standard_library() -> Iterator[list[tuple[str, bytes]]]:
    with contextlib.suppress(ImportError):
        topics = importlib.import_module("pydoc_data.topics").topics
        yield from ([(f"topics/{topic}", text.encode())] for topic, text in sorted(topics.items()))
    for name, path in _folder(Path(sysconfig.get_path("stdlib")), {}, ".py", _NOT_LIBRARY):
        with contextlib.suppress(_NoText):
            yield _read(path, name)


def _is_text(data: bytes) -> bool:
    try:
        return b"\0" not in data and data.decode() is not None
    except UnicodeDecodeError:
        return False
