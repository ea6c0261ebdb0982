"""Text of TFDS datasets, by name or by the folder in which one is prepared. Only their use imports TFDS."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import os
import re
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

from nested_jax.data.local import FEW, HELDOUT, HELP, PIECE, cut
from nested_jax.data.summary import Summary
from nested_jax.errors import UserError
from nested_jax.files import read_file

_HELDOUT_SPLITS = ("heldout", "validation", "valid", "test")
_PATIENCE = 5.0  # seconds


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


def tfds_documents(source: str, split: str, data_dir: str | os.PathLike[str] | None) -> tuple[Sequence[bytes], Summary]:
    """The documents of a split of a TFDS dataset, and how many it has, see `open_documents`."""
    builder, feature = _tfds_builder(source, data_dir)
    splits = list(builder.info.splits)
    train = "train" if "train" in splits else splits[0]
    heldout = next((name for name in _HELDOUT_SPLITS if name in splits and name != train), None)
    examples = builder.as_data_source(heldout if split == "heldout" and heldout else train)
    documents = _Texts(examples, feature, range(len(examples)))
    if len(documents) < FEW:
        documents = [piece for text in documents for piece in cut(text, PIECE)]
    if heldout is None:
        total = len(documents)
        held = max(1, int(HELDOUT * total))
        documents = documents[: total - held] if split == "train" else documents[total - held :]
    else:
        held = builder.info.splits[heldout].num_examples
        total = held + builder.info.splits[train].num_examples
    if len(documents) == 0:
        raise UserError(f"TFDS dataset {source} has no documents to {split} on: choose another one")
    return documents, Summary(0, 0, total, held, {})


def _tfds_builder(source: str, data_dir: str | os.PathLike[str] | None) -> tuple[Any, str]:
    """The builder of a TFDS dataset, prepared, and the name of its text feature."""
    import tensorflow_datasets as tfds

    name, _, feature = source.rpartition(":")
    if not name or re.fullmatch(r"[\d.*]+", feature):  # a version
        name, feature = source, ""
    path = Path(os.path.expanduser(name))
    try:
        if prepared := bool(name) and path.exists():
            _assert_own_features(path)
            builder: Any = tfds.builder_from_directory(path)
        else:
            _assert_known(name, source)
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        texts = sorted(key for key, value in builder.info.features.items() if isinstance(value, tfds.features.Text))
        if not texts or (feature and feature not in texts):
            known = ", ".join(texts) or "no text at all"
            raise UserError(f"TFDS dataset {source} has no such feature: it has {known}; give name:feature")
        if not prepared and not builder.is_prepared():
            _assert_reachable(source, builder.url_infos)
            builder.download_and_prepare(file_format="array_record")
        builder.as_data_source(list(builder.info.splits)[0])
    except UserError:
        raise
    except Exception as error:  # whatever a dataset's own code or the network raises
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        remedy = "install what it needs, or give a data_dir where it is prepared as array_record"
        raise UserError(f"TFDS dataset {source} cannot be read: {reason}; {remedy}") from error
    return builder, feature or ("text" if "text" in texts else texts[0])


def _assert_own_features(path: Path) -> None:
    """Raises UserError where a prepared dataset names a class of its features that TFDS would import from elsewhere."""
    waiting = [json.loads(read_file(path / "features.json", 2**24))]
    while waiting:
        part = waiting.pop()
        values = part.values() if isinstance(part, dict) else part
        waiting += [value for value in values if isinstance(value, dict | list)]
        for key in ("pythonClassName", "python_class_name", "type") if isinstance(part, dict) else ():
            name = part.get(key)
            if isinstance(name, str) and "." in name and not name.startswith("tensorflow_datasets."):
                raise UserError(f"{path / 'features.json'} names {name}, which is not of TFDS: give another dataset")


def _assert_known(name: str, source: str) -> None:
    """Raises UserError, with what is nearest, for a dataset or a config that TFDS does not have."""
    import tensorflow_datasets as tfds

    dataset, _, config = name.partition("/")
    dataset = dataset.partition(":")[0]
    config = config.partition("/")[0].partition(":")[0]
    if dataset not in (known := _tfds_names()):
        near = difflib.get_close_matches(dataset, known, 3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        if "/" in name or "." in name:
            raise UserError(f"path {source} does not exist: {hint}{HELP}")
        raise UserError(f"dataset {source or repr(source)} is unknown: {hint}{HELP}")
    configs = list(tfds.builder_cls(dataset).builder_configs)
    if config and config not in configs and not re.fullmatch(r"[\d.*]+", config):
        near = difflib.get_close_matches(config, configs, 5, cutoff=0.3) or configs[:5]
        some = f"it has {', '.join(near)}{' and more' if len(configs) > len(near) else ''}" if near else "it has none"
        raise UserError(f"TFDS dataset {dataset} has no config {config}: {some}; give {dataset}/CONFIG")


def _assert_reachable(source: str, urls: Iterable[str] | None) -> None:
    """Raises UserError where the host of a download does not answer within seconds: TFDS would go on trying for minutes."""
    for url in list(urls or ())[:1]:
        parts = urllib.parse.urlsplit(urllib.request.getproxies().get(urllib.parse.urlsplit(url).scheme, url))
        port = parts.port or {"http": 80, "ftp": 21}.get(parts.scheme, 443)
        answered = threading.Event()

        def connect(host=parts.hostname, port=port, answered=answered):
            with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=_PATIENCE):
                answered.set()

        attempt = threading.Thread(target=connect, daemon=True)  # looking up a name has no time limit of its own
        attempt.start()
        attempt.join(_PATIENCE)
        if parts.hostname and not answered.is_set():
            remedy = "connect to it, or give text that is here: a path, stdlib, or a data_dir where it is prepared"
            raise UserError(f"TFDS dataset {source} cannot be downloaded: {parts.hostname} does not answer; {remedy}")


def _tfds_names() -> list[str]:
    import tensorflow_datasets as tfds

    for group in ("text", "summarization", "translate", "structured"):  # registered on import only
        importlib.import_module(f"tensorflow_datasets.{group}")
    return sorted(set(tfds.list_builders(with_community_datasets=False)))
