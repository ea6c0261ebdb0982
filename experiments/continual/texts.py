"""Languages of LibreOffice's help as plain text: `python experiments/continual/texts.py --packages FOLDER --into FOLDER`.

for l in en-us de it nl pt-br cs; do apt-get download libreoffice-help-$l; done
for package in *.deb; do dpkg -x $package packages; done
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags

from nested_jax.errors import UserError

ENGLISH = "en-US"


@dataclass(frozen=True)
class Config:
    """Write a file of text for each language: its paragraphs, each once, without those that are English in it too."""

    packages: str
    """Folder that Debian's packages libreoffice-help-* were unpacked into."""
    into: str
    """Folder of the files to write."""


class _Paragraphs(HTMLParser):
    """Text of the paragraphs and headings of a page, in `found`."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.open = False

    def handle_starttag(self, tag, attrs):
        if tag in ("p", "h1", "h2", "h3"):
            self.open = True
            self.found.append("")

    def handle_endtag(self, tag):
        self.open = self.open and tag not in ("p", "h1", "h2", "h3")

    def handle_data(self, data):
        if self.open:
            self.found[-1] += data


def paragraphs(page: str) -> list[str]:
    """Of an HTML page, with single spaces.

    >>> paragraphs("<h1>Title</h1><script>x</script><p>One <b>bold</b>\\n word.</p><p> </p>")
    ['Title', 'One bold word.']
    """
    parser = _Paragraphs()
    parser.feed(page)
    return [text for text in (" ".join(found.split()) for found in parser.found) if text]


def write(packages: Path, into: Path) -> None:
    """Writes the file of every language.

    Raises:
        UserError: there is no help, or none in English.
    """
    folders = {folder.name: folder for folder in packages.glob("**/libreoffice/help/*") if (folder / "text").is_dir()}
    if ENGLISH not in folders:
        raise UserError(
            f"--packages {packages} holds no unpacked libreoffice-help-{ENGLISH.lower()}: see the first lines of texts.py"
        )
    read = lambda folder: [
        text for page in sorted(folder.glob("text/**/*.html")) for text in paragraphs(page.read_text("utf-8"))
    ]
    texts = {name: dict.fromkeys(read(folder)) for name, folder in folders.items()}  # each paragraph once, in order
    into.mkdir(parents=True, exist_ok=True)
    for name, own in texts.items():
        kept = [text for text in own if name == ENGLISH or text not in texts[ENGLISH]]
        (into / f"{name}.txt").write_text("\n".join(kept) + "\n", "utf-8")
        print(f"{name}: {sum(map(len, kept)):,} characters")


def main() -> None:
    config = flags.parse(Config)
    write(Path(config.packages), Path(config.into))


if __name__ == "__main__":
    flags.run(main)
