"""Text as TFDS datasets read without TensorFlow: the standard library, a local folder or file, any TFDS name.

`open_documents` opens all of them as a random-access sequence of documents, the shape the pipeline reads.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import io
import os
import re
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import tensorflow_datasets as tfds
from absl import logging

from nested_jax.errors import UserError

_HELDOUT = 0.05  # share of the files, or of the documents of a file, that is held out
_FEW = 20  # fewer files than this are cut into documents, so that a twentieth can be held out
_DOCUMENT = 2**14  # bytes of a document cut from a file
_LONGEST = 2**24  # bytes beyond which any file is cut
_HELDOUT_SPLITS = ("heldout", "validation", "valid", "test")
_NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data")
_HELP = 'give "stdlib", the path of a text folder or file, or a TFDS dataset name, optionally name:feature'


class LocalText(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of local text: features `text` and `name`, splits `train` and `heldout`, by file.

    `source` is "stdlib" (the running Python's standard library: its help topics, which are prose, and its modules), a
    folder (every UTF-8 file in it, but hidden and repeated ones) or a file. Fewer than 20 files are cut into documents
    of about 16 KiB at blank lines, and documents instead of files are held out. The dataset's config is named by a
    fingerprint of the contents: changed text is another dataset. Raises UserError when there is no text.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # nothing is downloaded: no checksums beside the code

    def __init__(self, source: str | os.PathLike = "stdlib", **kwargs):
        self._source = source = os.fspath(source)
        self._cut_size, units, fingerprint = _survey(source)
        self._heldout = _hold_out(units)
        name = re.sub(r"\W+", "_", Path(source).resolve().name)
        config = tfds.core.BuilderConfig(name=f"{name}-{fingerprint}")
        super().__init__(config=config, **{"file_format": "array_record", **kwargs})

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"name": tfds.features.Text(), "text": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(False), "heldout": self._generate_examples(True)}

    def _generate_examples(self, heldout: bool):
        for unit, name, text in _documents(self._source, self._cut_size):
            if (unit in self._heldout) == heldout:
                yield name, {"name": name, "text": text.decode()}


def open_documents(
    source: str | os.PathLike, split: str = "train", *, data_dir: str | os.PathLike | None = None
) -> grain.MapDataset:
    """The documents of a text source, each the bytes of its UTF-8 text, by index; `split` is "train" or "heldout".

    `source` is "stdlib", an existing path (text, or a TFDS dataset already prepared) or a TFDS name such as "lm1b",
    "wiki40b/en" or "pg19:book_text" (the feature `text`, else the first Text feature by name, unless one is given).
    Of a TFDS dataset, "heldout" is its split heldout, validation or test, else the last twentieth of train.
    Local text is prepared in `data_dir`, else $NESTED_JAX_CACHE, else ~/.cache/nested_jax, and again whenever it
    changes; TFDS names in `data_dir` or where TFDS keeps them. Raises UserError when the source is missing or no text.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "poem.txt").write_text("Tyger Tyger, burning bright,\\n" * 40)
    ...     documents = open_documents(folder, data_dir=folder)
    ...     documents[0][:11]
    b'Tyger Tyger'
    """
    source = os.fspath(source)
    if split not in ("train", "heldout"):
        raise UserError(f'split {split!r} is unknown: give "train" or "heldout"')
    path = Path(os.path.expanduser(source))
    if source == "stdlib" or (source and path.exists() and not (path / "dataset_info.json").exists()):
        builder = _prepare_local(source if source == "stdlib" else path.absolute(), data_dir)
        return _texts(builder, split, "text")
    builder, feature = _prepare_named(source, data_dir)
    splits = list(builder.info.splits)
    train = "train" if "train" in splits else splits[0]
    heldout = next((name for name in _HELDOUT_SPLITS if name in splits and name != train), None)
    documents = _texts(builder, heldout if split == "heldout" and heldout else train, feature)
    if len(documents) < _FEW:
        documents = grain.MapDataset.source([piece for text in documents for piece in _cut(text, _DOCUMENT)])
    if heldout is None:
        first = len(documents) - max(1, int(_HELDOUT * len(documents)))
        documents = documents[:first] if split == "train" else documents[first:]
    if len(documents) == 0:
        raise UserError(f"TFDS dataset {source} has no documents to {split} on: choose another one")
    return documents


def _texts(builder: tfds.core.DatasetBuilder, split: str, feature: str) -> grain.MapDataset:
    return grain.MapDataset.source(builder.as_data_source(split)).map(lambda example: example[feature])


# Local text


def _prepare_local(source: str | Path, data_dir: str | os.PathLike | None) -> LocalText:
    root = Path(data_dir or os.environ.get("NESTED_JAX_CACHE") or "~/.cache/nested_jax").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / "local_text.lock", "w") as lock, _quiet():
            fcntl.flock(lock, fcntl.LOCK_EX)  # several processes of one run prepare one after the other
            builder = LocalText(source, data_dir=root)
            if not builder.data_path.exists():
                for leftover in builder.data_path.parent.glob("incomplete*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                skip = tfds.download.ComputeStatsMode.SKIP
                config = tfds.download.DownloadConfig(try_download_gcs=False, compute_stats=skip)
                builder.download_and_prepare(download_config=config)
            return builder
    except OSError as error:
        reason = f"{error.filename or root}: {error.strerror}"
        remedy = f"the source must be readable and the cache {root} writable ($NESTED_JAX_CACHE moves it)"
        raise UserError(f"{reason}; {remedy}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what TFDS prints, its progress bars and its log: local text takes a second."""
    bars = tfds.core.utils.tqdm_utils
    shown, verbosity = bars._active, logging.get_verbosity()
    bars.display_progress_bar(False)
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        bars.display_progress_bar(shown)
        logging.set_verbosity(verbosity)


def _survey(source: str) -> tuple[int, list[str], str]:
    """The size to cut files at, the units that are held out or not, and a fingerprint of names and contents."""
    digest, names, total = hashlib.blake2b(digest_size=8), [], 0
    for name, text in _files(source):
        digest.update(f"{name}\0{len(text)}\0".encode() + text)
        names.append(name)
        total += len(text)
    if total < 64:
        raise UserError(f"{source} holds {total} bytes of UTF-8 text: {_HELP}")
    if len(names) >= _FEW:
        return _LONGEST, names, digest.hexdigest()
    size = min(_DOCUMENT, max(1024, int(_HELDOUT * total)), total // 2)
    return size, [unit for unit, _, _ in _documents(source, size)], digest.hexdigest()


def _hold_out(units: Sequence[str]) -> set[str]:
    """About a twentieth of the units, at least one and not all, by hash: a new file moves no other one."""
    ranked = sorted(units, key=_hash)
    return {unit for i, unit in enumerate(ranked) if i == 0 or (i < len(ranked) - 1 and _hash(unit) < _HELDOUT)}


def _hash(name: str) -> float:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64


def _documents(source: str, size: int) -> Iterator[tuple[str, str, bytes]]:
    """(unit, name, text) of documents of at most `size` bytes; the unit is held out or not, as one."""
    for name, text in _files(source):
        pieces = _cut(text, size)
        for i, piece in enumerate(pieces):
            document = f"{name}#{i}" if len(pieces) > 1 else name
            yield name if size == _LONGEST else document, document, piece


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


def _files(source: str) -> Iterator[tuple[str, bytes]]:
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
    """Every file below a folder that is UTF-8 text, but for hidden ones, prepared datasets (a cache in it) and runs."""

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


def _prepare_named(source: str, data_dir: str | os.PathLike | None) -> tuple[tfds.core.DatasetBuilder, str]:
    """The builder of a TFDS dataset, prepared, and the name of its text feature."""
    name, _, feature = source.rpartition(":")
    if not name or re.fullmatch(r"[\d.*]+", feature):  # a version
        name, feature = source, ""
    path = Path(os.path.expanduser(name))
    try:
        if prepared := bool(name) and path.exists():
            builder = tfds.builder_from_directory(path)
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
    for group in ("text", "summarization", "translate", "structured"):  # registered on import only
        importlib.import_module(f"tensorflow_datasets.{group}")
    return tfds.list_builders(with_community_datasets=False)
