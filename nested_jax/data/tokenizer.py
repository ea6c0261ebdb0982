"""Tokenizers: bytes, SentencePiece pieces trained on the text itself, and those of pretrained models. All are lossless."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import sentencepiece

from nested_jax.data import pretrained
from nested_jax.errors import UserError
from nested_jax.files import read_file, write_file

_BYTES = b"nested_jax byte tokenizer\n"  # the contents of a saved ByteTokenizer
_LARGEST = 2**26  # bytes of a tokenizer's file
_BOUNDARY = "<document>"
_SPACE = "\u2581"  # SentencePiece's sign for a space; where the text contains it, it is encoded as bytes

_RESERVED = "\u2585"  # the trainer leaves out sentences that hold it


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of tokenizers.

    Bits per byte is the summed loss, in bits, over the sum of `byte_lengths[targets]`.
    """

    vocabulary: int
    """Number V of ids."""
    boundary: int
    """The id between documents, which no text encodes to."""
    ends: frozenset[int]
    """Ids after which a text that a model writes has ended, the boundary among them."""
    byte_lengths: np.ndarray
    """(V,) int32: bytes of text that each id stands for; 0 for the boundary."""

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids (T,) int32 of a text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids (T,)."""
        ...

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file for `load_tokenizer`."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as tokens, V = 256. Id 0 is the document boundary; byte 0 is id 255, a byte that UTF-8 does not have.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("né")
    array([110, 195, 169], dtype=int32)
    >>> tokenizer.decode([110, 195, 169])
    'né'
    """

    vocabulary = 256
    boundary = 0
    ends = frozenset({0})
    _null = 255

    def __init__(self):
        self.byte_lengths = np.ones(self.vocabulary, np.int32)
        self.byte_lengths[self.boundary] = 0

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids (T,) int32 of a text, one for each byte; bytes that are not UTF-8 become U+FFFD."""
        ids = np.frombuffer(_utf8(text), np.uint8).astype(np.int32)
        ids[ids == 0] = self._null
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids (T,); a boundary has none. Bytes that are not UTF-8 become U+FFFD. Raises UserError for ids
        out of range."""
        ids = _in_range(ids, self.vocabulary)
        ids = ids[ids != self.boundary]
        return np.where(ids == self._null, 0, ids).astype(np.uint8).tobytes().decode(errors="replace")

    def save(self, path: str | os.PathLike) -> None:
        """Writes a file for `load_tokenizer`."""
        write_file(Path(path), _BYTES)


class SentencePieceTokenizer:
    """SentencePiece (BPE, byte fallback) without normalization: every text decodes to itself, white space included.

    Made by `SentencePieceTokenizer.train` and `load_tokenizer`. The boundary is a control symbol.

    Args:
        model: a serialized SentencePiece model with that control symbol.

    Raises:
        UserError: the model has no such symbol.

    Source: Kudo and Richardson 2018 (SentencePiece); Sennrich et al. 2016 (BPE).

    >>> tokenizer = SentencePieceTokenizer.train(["to be, or not to be: " * 20], vocabulary=280)
    >>> tokenizer.decode(tokenizer.encode("  To be\\n\\tis to do ☃"))
    '  To be\\n\\tis to do ☃'
    """

    def __init__(self, model: bytes):
        self._model = model
        self._pieces = pieces = sentencepiece.SentencePieceProcessor()
        pieces.load_from_serialized_proto(model)
        self.vocabulary = int(pieces.vocab_size())
        self.boundary = pieces.piece_to_id(_BOUNDARY)
        if not pieces.is_control(self.boundary):
            raise UserError(f"tokenizer without control symbol {_BOUNDARY}: make one with SentencePieceTokenizer.train")
        self.ends = frozenset({self.boundary})
        self._text = [self._bytes_of(i) for i in range(self.vocabulary)]
        ids = {byte: pieces.piece_to_id(f"<0x{byte:02X}>") for byte in (*_SPACE.encode(), *b" ")}
        self._spelled, self._space = [ids[byte] for byte in _SPACE.encode()], ids[ord(" ")]
        self.byte_lengths = np.array([len(text) for text in self._text], np.int32)

    @classmethod
    def train(cls, documents: Iterable[str | bytes], vocabulary: int, *, max_bytes: int = 10**8) -> SentencePieceTokenizer:
        """Trains a tokenizer.

        Args:
            documents: texts.
            vocabulary: number V of ids, 256 of them bytes.
            max_bytes: bytes of the documents that are used, the first ones.

        Returns:
            A tokenizer of exactly that vocabulary.

        Raises:
            UserError: the text has too many characters, or too few, for that vocabulary.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(documents, max_bytes),
                model_writer=model,
                vocab_size=vocabulary,
                model_type="bpe",
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                control_symbols=[_BOUNDARY],
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                max_sentence_length=1 << 20,
                num_threads=os.cpu_count(),
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = re.sub(r"^.*\] ", "", str(error)).split(" Increase vocab_size")[0].rstrip(". ") or "it is empty"
            raise UserError(f"vocabulary {vocabulary} does not fit the text: {reason}; choose another size") from error
        return cls(model.getvalue())

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids (T,) int32 of a text; bytes that are not UTF-8 become U+FFFD."""
        first, *rest = _utf8(text).decode().split(_SPACE)
        ids = self._encode(first)
        for part in rest:
            ids += self._spelled + self._encode(part)
        return np.array(ids, np.int32)

    def _encode(self, text: str) -> list[int]:
        """Ids of a text without U+2581. Where no piece is a space, SentencePiece spells U+2581 in bytes: a space is one."""
        ids = self._pieces.encode(text)
        if self._spelled[0] not in ids:
            return ids
        spaced, i = [], 0
        while i < len(ids):
            is_space = ids[i : i + 3] == self._spelled
            spaced.append(self._space if is_space else ids[i])
            i += 3 if is_space else 1
        return spaced

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids (T,); a boundary has none. Raises UserError for ids out of range."""
        return b"".join(self._text[i] for i in _in_range(ids, self.vocabulary)).decode(errors="replace")

    def save(self, path: str | os.PathLike) -> None:
        """Writes the SentencePiece model, a file for `load_tokenizer`."""
        write_file(Path(path), self._model)

    def _bytes_of(self, i: int) -> bytes:
        if self._pieces.is_control(i) or self._pieces.is_unknown(i):
            return b""
        piece = self._pieces.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if self._pieces.is_byte(i) else piece.replace(_SPACE, " ").encode()


def load_tokenizer(path: str | os.PathLike, *, within: Path | None = None) -> Tokenizer:
    """The tokenizer that `save` wrote to a file.

    Args:
        path: the file.
        within: a folder that links must not lead out of; None: links may lead anywhere.

    Returns:
        A tokenizer that encodes and decodes as the saved one.

    Raises:
        UserError: the file cannot be read, or is not one that `save` wrote.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     ByteTokenizer().save(file.name)
    ...     load_tokenizer(file.name).vocabulary
    256
    """
    remedy = "give a file written by a tokenizer's save"
    try:
        data = read_file(path, _LARGEST, within=within)
    except OSError as error:
        raise UserError(f"tokenizer {path}: {error.strerror}; {remedy}") from error
    if data == _BYTES:
        return ByteTokenizer()
    if data.startswith(pretrained.MARK):
        pretrained.library()  # where it is missing, the file is not to blame
    try:
        return pretrained.of_bytes(data) if data.startswith(pretrained.MARK) else SentencePieceTokenizer(data)
    except (RuntimeError, UserError) as error:
        raise UserError(f"tokenizer {path} is damaged or of another kind: {remedy}") from error


def _utf8(text: str | bytes) -> bytes:
    """A text in UTF-8, by which it can be decoded."""
    if isinstance(text, str):
        return text.encode(errors="replace")
    return bytes(text).decode(errors="replace").encode()


def _in_range(ids: Iterable[int], vocabulary: int) -> np.ndarray:
    ids = np.asarray(ids if hasattr(ids, "__len__") else list(ids), np.int64)
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if wrong.size:
        raise UserError(f"token id {wrong[0]} is out of range: this tokenizer's ids are 0 to {vocabulary - 1}")
    return ids


def _sentences(documents: Iterable[str | bytes], max_bytes: int, length: int = 4096) -> Iterable[str]:
    """Pieces of `length` characters of the first `max_bytes` bytes. (The trainer counts words; few span two pieces.)"""
    for text in documents:
        text = _utf8(text)[:max_bytes].decode(errors="ignore")
        max_bytes -= len(text.encode())
        for part in text.split(_RESERVED):
            yield from (part[i : i + length] for i in range(0, len(part), length))
        if max_bytes <= 0:
            return
