"""Domains of English as plain text: `python experiments/continual/domains.py --packages FOLDER --into FOLDER`.

for p in anarchism sword-text-kjv python3.11-doc; do apt-get download $p; done
for package in *.deb; do dpkg -x $package packages; done
"""

from __future__ import annotations

import gzip
import re
import struct
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags

from nested_jax.checks import Count
from nested_jax.errors import UserError


@dataclass(frozen=True)
class Config:
    """Write a file of text for each domain: prose, code, scripture, manuals."""

    packages: str
    """Folder that Debian's packages anarchism, sword-text-kjv and python3.11-doc were unpacked into."""
    into: str
    """Folder of the files to write."""
    most: Count = 3_500_000
    """Bytes of each file, at the most."""


def prose(packages: Path) -> Iterator[str]:
    """Essays, a section each."""
    for file in sorted(packages.glob("**/anarchism/markdown/*.md.gz")):
        yield gzip.decompress(file.read_bytes()).decode(errors="replace")


def code(packages: Path) -> Iterator[str]:
    """Modules of the running Python's standard library."""
    del packages
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield file.read_text("utf-8", errors="replace")


def scripture(packages: Path) -> Iterator[str]:
    """Books of the King James Version, without notes, from SWORD's blocks (offset, size, size unpacked), zlib's."""
    for index in sorted(packages.glob("**/texts/ztext/*/[on]t.bzs"), reverse=True):  # the Old Testament first
        packed = index.with_suffix(".bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index.read_bytes()):
            yield plain(zlib.decompress(packed[offset : offset + size]).decode(errors="replace"))


def manuals(packages: Path) -> Iterator[str]:
    """Pages of Python's documentation, as they are written."""
    for file in sorted(packages.glob("**/python3*/html/_sources/library/*.txt")):
        yield file.read_text("utf-8", errors="replace")


def plain(text: str) -> str:
    """Text of markup, without notes, a line a verse.

    >>> plain('<verse osisID="a"/>In the <w lemma="x">beginning</w> God<note>or, x</note>.<lb/> And')
    'In the beginning God. And'
    """
    text = re.sub(r"<(note|title)\b[^>]*>.*?</\1>", "", text, flags=re.DOTALL)
    lines = (" ".join(line.split()) for line in re.sub(r"<[^>]*>", "", text).splitlines())
    return "\n".join(filter(None, lines))


DOMAINS: dict[str, Callable[[Path], Iterator[str]]] = {
    "prose": prose,
    "code": code,
    "scripture": scripture,
    "manuals": manuals,
}


def write(packages: Path, into: Path, most: int) -> None:
    """Writes the file of every domain.

    Raises:
        UserError: a package is missing.
    """
    found = {name: "\n\n".join(islice(read(packages), 5000)) for name, read in DOMAINS.items()}
    if missing := [name for name, text in found.items() if not text.strip()]:
        raise UserError(f"--packages {packages} has no text of {', '.join(missing)}: see the first lines of domains.py")
    into.mkdir(parents=True, exist_ok=True)
    for name, text in found.items():
        cut = text.encode()[:most].decode(errors="ignore")
        (into / f"{name}.txt").write_text(cut, "utf-8")
        print(f"{name}: {len(cut.encode()):,} bytes")


if __name__ == "__main__":
    flags.run(lambda: write(Path((config := flags.parse(Config)).packages), Path(config.into), config.most))
