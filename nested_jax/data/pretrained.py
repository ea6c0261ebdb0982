"""Tokenizers that come with pretrained models: pairs of bytes (BPE), read and run by the `tokenizers` library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nested_jax.errors import UserError
from nested_jax.files import read_file, write_file

MARK = b'{"nested_jax":"pretrained tokenizer"'
"""How a saved one begins."""
_LARGEST = 2**26  # bytes of a tokenizer's file
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {"gpt-2": None, "smollm": None, "llama-bpe": _WORDS % "{1,3}", "qwen2": _WORDS % ""}
"""Patterns by which a text is cut before pairs are merged, by GGUF's name; None: GPT-2's, of smollm after single digits."""


class PretrainedTokenizer:
    """A byte-level BPE tokenizer of a pretrained model. Marks of documents and turns have no text, and no text has them.

    Made by `of_gguf`, `of_folder` and `load_tokenizer`.

    Args:
        pairs: a tokenizer in the JSON of the `tokenizers` library, without special tokens.
        special: ids of special tokens by name.
        boundary: the id between documents.
        ends: ids after which a text of the model's own ends.
        template: of a chat, in Jinja; None: there is none.

    Raises:
        UserError: the JSON is no such tokenizer, or the library is not installed.
    """

    def __init__(
        self, pairs: str, special: dict[str, int], boundary: int, ends: Sequence[int] = (), template: str | None = None
    ):
        self._saved = {"pairs": pairs, "special": special, "boundary": boundary, "ends": [*ends], "template": template}
        tokenizers = library()
        try:
            self._pairs = tokenizers.Tokenizer.from_str(pairs)
        except Exception as error:  # the library raises plain Exceptions
            raise UserError(f"tokenizer: {' '.join(str(error).split())[:80]}; give one of the tokenizers library") from None
        own = self._pairs.get_vocab(with_added_tokens=False)
        self.special, self.boundary, self.template = special, boundary, template
        self.ends = frozenset({boundary, *ends})
        self.vocabulary = max([*own.values(), *special.values(), boundary]) + 1
        spelled, self._text = _bytes(), [b""] * self.vocabulary
        for piece, i in own.items():
            if i not in special.values():
                self._text[i] = bytes(spelled[letter] for letter in piece if letter in spelled)
        self.byte_lengths = np.array([len(text) for text in self._text], np.int32)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids (T,) int32 of a text; names of special tokens in it are text."""
        text = text if isinstance(text, str) else bytes(text).decode(errors="replace")
        return np.asarray(self._pairs.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids (T,); special tokens have none. Raises UserError for ids out of range."""
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocabulary]:
            raise UserError(f"token id {wrong[0]} is out of range: this tokenizer's ids are 0 to {self.vocabulary - 1}")
        return b"".join(self._text[i] for i in ids).decode(errors="replace")

    def chat(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
        """Token ids of messages in the model's own form, up to where its answer begins.

        Args:
            messages: of keys role and content; special tokens in a content are text.

        Raises:
            UserError: the model has no form for a chat, or refuses these messages.
        """
        if self.template is None:
            raise UserError("chat: the model has no template of a chat: give text")
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        marks = {f"\ue000{i}\ue001": message["content"] for i, message in enumerate(messages)}  # private: no content's
        masked = [message | {"content": mark} for message, mark in zip(messages, marks, strict=True)]
        names = {f"{name}_token": "" for name in ("bos", "eos", "unk", "pad")}
        try:
            made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(self.template)
            text = made.render(messages=masked, add_generation_prompt=True, **names)
        except Exception as error:  # whatever its code runs into
            raise UserError(
                f"chat: the model's template refuses the messages ({' '.join(str(error).split())[:80]}): give others"
            ) from None
        ids, rest = [], ""
        while text:
            found = [(at, name) for name in (*self.special, *marks) if (at := text.find(name)) >= 0]
            at, name = min(found, key=lambda each: (each[0], -len(each[1])), default=(len(text), ""))
            rest, text = rest + text[:at] + marks.get(name, ""), text[at + len(name) :]
            if name in self.special or not text:
                ids += [*self.encode(rest), *([self.special[name]] if name in self.special else [])]
                rest = ""
        return np.asarray(ids, np.int32)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a file for `load_tokenizer`."""
        write_file(Path(path), MARK + b"," + json.dumps(self._saved).encode()[1:])


def of_bytes(data: bytes) -> PretrainedTokenizer:
    """A tokenizer of a saved file's bytes. Raises UserError where they are none."""
    try:
        saved = {name: value for name, value in json.loads(data).items() if name != "nested_jax"}
        return PretrainedTokenizer(**saved)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"tokenizer: {' '.join(str(error).split())[:80]}") from None


def of_gguf(about: dict[str, Any]) -> PretrainedTokenizer:
    """The tokenizer in a GGUF file's fields.

    Raises:
        UserError: it is of another kind.
    """
    kind, cut = about.get("tokenizer.ggml.model"), about.get("tokenizer.ggml.pre", "gpt-2")
    cut = "gpt-2" if cut == "default" else cut
    if kind != "gpt2" or cut not in _CUTS:
        raise UserError(f"tokenizer of kind {kind!r}, {cut!r}: give a model with one of {', '.join(_CUTS)}")
    pieces, types = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
    special = {piece: i for i, (piece, kind) in enumerate(zip(pieces, types, strict=True)) if kind != 1}
    tokenizers = library()
    pre = tokenizers.pre_tokenizers
    merges = [tuple(pair.split(" ", 1)) for pair in about["tokenizer.ggml.merges"]]
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    pattern = _CUTS[cut]
    first = [pre.Split(tokenizers.Regex(pattern), "isolated")] if pattern else []
    first += [pre.Digits(individual_digits=True)] if cut == "smollm" else []
    pairs.pre_tokenizer = pre.Sequence([*first, pre.ByteLevel(add_prefix_space=False, use_regex=pattern is None)])
    end = int(about.get("tokenizer.ggml.eos_token_id", 0))
    boundary = special.get("<|endoftext|>", end)
    return PretrainedTokenizer(pairs.to_str(), special, boundary, [end], about.get("tokenizer.chat_template"))


def of_folder(folder: Path) -> PretrainedTokenizer:
    """The tokenizer of a folder with tokenizer.json, and tokenizer_config.json where there is one.

    Raises:
        UserError: there is none, or it is no byte-level BPE.
    """
    try:
        pairs = {} | json.loads(read_file(folder / "tokenizer.json", _LARGEST))
        more = folder / "tokenizer_config.json"
        about = {} | (json.loads(read_file(more, _LARGEST)) if more.exists() else {})
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} has no tokenizer.json that can be read ({error}): give a model's whole folder") from None
    if pairs.get("model", {}).get("type") != "BPE" or "ByteLevel" not in json.dumps(pairs.get("pre_tokenizer")):
        raise UserError(f"{folder / 'tokenizer.json'} is no byte-level BPE: give a model with one")
    special: dict[str, int] = {one["content"]: one["id"] for one in pairs.get("added_tokens", ())}
    name = lambda token: str(token["content"] if isinstance(token, dict) else token)
    if not special:
        raise UserError(f"{folder / 'tokenizer.json'} has no special token to end a text: give a model with one")
    end = special.get(name(about.get("eos_token")), min(special.values()))
    pairs |= {"added_tokens": [], "post_processor": None}
    for piece, i in special.items():
        pairs["model"]["vocab"].setdefault(piece, i)
    boundary = special.get("<|endoftext|>", end)
    return PretrainedTokenizer(json.dumps(pairs), special, boundary, [end], about.get("chat_template"))


def library() -> Any:
    """The `tokenizers` library. Raises UserError where it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise UserError('a pretrained tokenizer needs tokenizers: pip install "nested-jax[convert]"') from None
    return tokenizers


def _bytes() -> dict[str, int]:
    """The byte that each letter of a piece stands for: printable ones for themselves, the others are from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
