"""What a source of text holds: files, bytes, documents, and what was left out."""

from __future__ import annotations

from typing import NamedTuple


class Summary(NamedTuple):
    """What a source of text holds. As a string, a line for the user."""

    files: int
    """Files that text was read from; 0 for a TFDS dataset."""
    text_bytes: int
    """Bytes of their text; 0 for a TFDS dataset, which is read as it is used."""
    documents: int
    """Documents of the source."""
    heldout: int
    """How many of them are held out."""
    left_out: dict[str, list[str]]
    """Names of the files, folders and lines that were left out, by the reason."""

    def __str__(self) -> str:
        files = f"{_count(self.files, 'file')}, {self.text_bytes:,} bytes, " if self.files else ""
        left_out = f"; left out: {reasons(self.left_out)}" if self.left_out else ""
        return f"{files}{_count(self.documents, 'document')}, {self.heldout:,} of them held out{left_out}"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def reasons(left_out: dict[str, list[str]]) -> str:
    """How much was left out, by reason, each with an example."""
    example = lambda names: names[0] if len(names) == 1 else f"{names[0]}, ..."
    return ", ".join(f"{len(names):,} {reason} ({example(names)})" for reason, names in left_out.items())
